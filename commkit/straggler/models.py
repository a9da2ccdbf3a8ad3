"""Which patterns of stragglers a scheme is designed for, and whether what happened so far is one of them.

A pattern is a sequence of rounds, each the set of workers that straggled as an integer (bit i is worker i). All
three are from sequential gradient coding (Krishnan et al. 2023, section 2).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


class StragglerModel(ABC):
    """A set of patterns that is closed under leaving out stragglers, and known by its windows.

    ``window`` is how many rounds each of its conditions looks at.
    """

    @property
    @abstractmethod
    def window(self) -> int: ...

    @abstractmethod
    def admits_next(self, before: Sequence[int], late: int) -> bool:
        """Whether ``late`` may follow upon ``before``, an admissible pattern. Only its last
        ``window - 1`` rounds are looked at."""

    def admits(self, pattern: Sequence[int]) -> bool:
        """Whether the whole of ``pattern`` is admissible."""
        return all(
            self.admits_next(pattern[max(0, r - self.window + 1) : r], late)
            for r, late in enumerate(pattern)
        )


@dataclass(frozen=True)
class PerRound(StragglerModel):
    """At most ``stragglers`` in every round."""

    stragglers: int

    def __post_init__(self) -> None:
        _at_least("stragglers", self.stragglers, 0)

    @property
    def window(self) -> int:
        return 1

    def admits_next(self, before: Sequence[int], late: int) -> bool:
        return late.bit_count() <= self.stragglers


@dataclass(frozen=True)
class Bursty(StragglerModel):
    """(B, W, lambda): in any ``window`` rounds at most ``stragglers`` different workers straggle, and the rounds
    in which one worker does lie within ``burst`` consecutive ones.

    Raises:
        ValueError: not ``1 <= burst <= window``, or a negative number of stragglers.
    """

    burst: int
    rounds: int
    stragglers: int

    def __post_init__(self) -> None:
        _at_least("burst", self.burst, 1)
        _at_least("stragglers", self.stragglers, 0)
        if self.rounds < self.burst:
            raise ValueError(
                f"rounds={self.rounds} must be >= burst={self.burst}: a burst lies within the window; "
                f"use rounds={self.burst + 1}"
            )

    @property
    def window(self) -> int:
        return self.rounds

    def admits_next(self, before: Sequence[int], late: int) -> bool:
        recent = before[-(self.rounds - 1) :] if self.rounds > 1 else ()
        seen = late
        for mask in recent:
            seen |= mask
        if seen.bit_count() > self.stragglers:
            return False
        # In the burst's reach are the last B - 1 rounds; whoever straggled earlier in the window must not.
        return not any(late & mask for mask in recent[: max(0, len(recent) - self.burst + 1)])


@dataclass(frozen=True)
class Arbitrary(StragglerModel):
    """(N, W', lambda'): in any ``rounds`` rounds at most ``stragglers`` different workers straggle, each in at
    most ``times`` of them.

    Raises:
        ValueError: a number is out of range.
    """

    times: int
    rounds: int
    stragglers: int

    def __post_init__(self) -> None:
        _at_least("times", self.times, 0)
        _at_least("rounds", self.rounds, 1)
        _at_least("stragglers", self.stragglers, 0)

    @property
    def window(self) -> int:
        return self.rounds

    def admits_next(self, before: Sequence[int], late: int) -> bool:
        recent = before[-(self.rounds - 1) :] if self.rounds > 1 else ()
        seen = late
        for mask in recent:
            seen |= mask
        if seen.bit_count() > self.stragglers:
            return False
        # at_least[k]: who straggled more than k times; a worker that is not late now was counted before.
        at_least = [0] * (self.times + 1)
        for mask in (*recent, late):
            for k in range(self.times, 0, -1):
                at_least[k] |= at_least[k - 1] & mask
            at_least[0] |= mask
        return not at_least[self.times]


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}={value} must be >= {least}")

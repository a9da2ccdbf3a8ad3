"""Schemes against stragglers as configuration: everything but the number of workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

from ..registry import spec
from .backup import DBW, StaticBackup
from .families import AutoFamily, CodeFamily
from .mu_rule import MuRule
from .multiplexed import MSGC
from .rounds import FirstK, Rounds, ScheduledRounds
from .schedule import Schedule
from .sequential import SRSGC, GradientCoding


class Method(ABC):
    """A frozen dataclass that is its own configuration."""

    @abstractmethod
    def build(self, num_workers: int) -> Rounds:
        """The scheme for these workers.

        Raises:
            ValueError: it does not go with so many; the message says what would.
        """

    def spec(self) -> dict[str, Any]:
        """What all ranks must have in common."""
        return {"method": type(self).__name__, **spec(self)}


@dataclass(frozen=True)
class Backup(Method):
    """The first k of n gradients; see :class:`~commkit.straggler.StaticBackup`.

    Args:
        num_backups: workers more than are awaited, n - k. 0 is synchronous training.
        k: how many to await, in place of ``num_backups``.
        min_share: see :class:`~commkit.straggler.BackupPolicy`. Shares of the batch go round, so by default nobody's
            data is kept out.
    """

    num_backups: int = 1
    k: int | None = None
    min_share: float = 0.0

    def build(self, num_workers: int) -> FirstK:
        k = num_workers - self.num_backups if self.k is None else self.k
        if self.k is None and not 0 <= self.num_backups < num_workers:
            raise ValueError(
                f"num_backups={self.num_backups} must be in 0..{num_workers - 1}, less than the number of workers"
            )
        return FirstK(StaticBackup(num_workers, k, self.min_share), adapts=False)


@dataclass(frozen=True)
class DynamicBackup(Method):
    """The first k of n gradients, k chosen anew in every step; the arguments are those of
    :class:`~commkit.straggler.DBW`."""

    gain: Literal["smoothness", "noise_scale"] = "smoothness"
    window: int = 5
    loss_tolerance: float = 0.01
    max_change: int = 2

    def build(self, num_workers: int) -> FirstK:
        policy = DBW(num_workers, self.gain, self.window, self.loss_tolerance, self.max_change)
        return FirstK(policy, adapts=True)


@dataclass(frozen=True)
class Coding(Method):
    """Gradient coding; see :class:`~commkit.straggler.GradientCoding`.

    Args:
        num_stragglers: s, how many may be late in every round.
        code: which.
        mu: rounds stay open until 1 + mu times what the fastest worker took; 0 closes as soon as the gradient can
            be decoded.
    """

    num_stragglers: int = 1
    code: CodeFamily = field(default_factory=AutoFamily)
    mu: float = 0.0

    def build(self, num_workers: int) -> ScheduledRounds:
        code = self.code.build(num_workers, self.num_stragglers)
        return ScheduledRounds(
            lambda: GradientCoding(num_workers, self.num_stragglers, code), MuRule(self.mu)
        )


@dataclass(frozen=True)
class SelectiveRepetition(Method):
    """SR-SGC; see :class:`~commkit.straggler.SRSGC`, whose arguments these are.

    Args:
        mu: as for :class:`Coding`; 1 in the paper.
    """

    burst: int = 1
    rounds: int = 2
    stragglers: int = 1
    code: CodeFamily = field(default_factory=AutoFamily)
    mu: float = 1.0

    def build(self, num_workers: int) -> ScheduledRounds:
        pattern = (self.burst, self.rounds, self.stragglers)
        s = SRSGC.code_stragglers(num_workers, *pattern)
        code = self.code.build(num_workers, s)
        return ScheduledRounds(lambda: SRSGC(num_workers, *pattern, code), MuRule(self.mu))


@dataclass(frozen=True)
class Multiplexed(Method):
    """M-SGC; see :class:`~commkit.straggler.MSGC`, whose arguments these are.

    Args:
        mu: as for :class:`Coding`; 1 in the paper.
    """

    burst: int = 1
    rounds: int = 2
    stragglers: int = 1
    code: CodeFamily = field(default_factory=AutoFamily)
    mu: float = 1.0

    def build(self, num_workers: int) -> ScheduledRounds:
        pattern = (self.burst, self.rounds, self.stragglers)
        code = None
        if self.stragglers < num_workers:
            code = self.code.build(num_workers, self.stragglers)

        def make() -> Schedule:
            return MSGC(num_workers, *pattern, code)

        make()  # which says what is wrong with the numbers
        return ScheduledRounds(make, MuRule(self.mu))

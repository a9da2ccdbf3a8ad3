"""When a round closes: pure, with the time as an argument."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from .rounds import Rounds


@dataclass
class Gate:
    """One round's arrivals.

    Enough has to be here; then the round stays open for ``grace_s``, and at least as long as the scheme says. It closes
    at once when nobody else can come.

    Args:
        rounds: says what is enough.
        grace_s: see :class:`~commkit.straggler.CoordinationOptions`.
        start: when the weights were sent.
        dead: workers that are lost; others may be added later.

    Attributes:
        arrived: seconds since the start, by worker, in the order of arrival.
        refused: workers whose result was of no use, such as inf.
    """

    rounds: Rounds
    grace_s: float
    start: float
    dead: set[int]
    arrived: dict[int, float] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    _enough_since: float | None = None

    def arrive(self, worker: int, now: float) -> None:
        self.arrived[worker] = now - self.start

    @property
    def late(self) -> set[int]:
        """Who is not here."""
        return set(range(self.rounds.num_workers)) - set(self.arrived)

    @property
    def awaited(self) -> set[int]:
        """Who may still come."""
        return self.late - self.refused - self.dead

    @property
    def stuck(self) -> bool:
        """Whether nobody else can come and it is not enough."""
        return not self.awaited and not self._enough()

    def closes_at(self, now: float) -> float:
        """When to close, as far as is known; inf: not before somebody else has come. To be asked after every
        event."""
        if not self._enough():
            self._enough_since = None
            return math.inf
        if self._enough_since is None:
            self._enough_since = now
        if not self.awaited:
            return now
        fastest = next(iter(self.arrived.values()))
        earliest = self.start + self.rounds.not_before(fastest)
        return max(earliest, self._enough_since + self.grace_s)

    def _enough(self) -> bool:
        out: Collection[int] = self.late - self.awaited
        return bool(self.arrived) and self.rounds.enough(self.late, out, self.dead)

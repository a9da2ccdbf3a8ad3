"""What inner steps cost, where transfers end beside them."""

from __future__ import annotations

from collections import deque

from ..metrics import StepStats
from ..runtime.meter import StepMeter
from ..types import Comm


class StepCosts:
    """Statistics of single inner steps. A transfer, which ends on the worker's thread at any time, counts in the step
    in which it ends.

    Attributes:
        last: of the last inner step.
    """

    def __init__(self) -> None:
        self.last = StepStats()
        self._ended: deque[StepStats] = deque()
        self._meter: StepMeter | None = None

    def measure(self, comm: Comm) -> None:
        """From now on, count what ``comm`` sends."""
        self._meter = StepMeter(comm)

    def add(self, seconds: float) -> None:
        """The worker was busy for so long."""
        assert self._meter is not None
        self._meter.add(seconds)

    def end_transfer(self, stats: StepStats) -> None:
        """A transfer has ended, and this is what the reducer tells of it."""
        self._ended.append(stats)

    def close(self, step: int, exposed: float) -> None:
        """Inner step number ``step`` is over; ``exposed`` seconds of it were communication."""
        assert self._meter is not None
        # Transfers may end meanwhile.
        stats = [self._ended.popleft() for _ in range(len(self._ended))]
        latest = stats[-1] if stats else self.last
        ended = StepStats(
            step=step,
            dense_bytes=sum(s.dense_bytes for s in stats),
            num_contributors=min((s.num_contributors for s in stats), default=0),
            nonfinite=any(s.nonfinite for s in stats),
            residual_norm=latest.residual_norm,
        )
        self.last = self._meter.close(ended, exposed)

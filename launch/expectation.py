"""What was predicted for a run, and what its first steps say of it."""

from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

TOLERANCE = 0.25
SETTLING = 5  # first steps: buckets are rebuilt, caches and links fill


@dataclass
class Expectation:
    """Of the scheme that was chosen.

    Args:
        scheme: that was chosen.
        reason: why.
        step_s: predicted, mean of a step.
        in_rounds: steps differ, so that whole rounds count.
        sync_every: steps of a round.
        last: step after which it is judged.
    """

    scheme: str
    reason: str
    step_s: float
    in_rounds: bool
    sync_every: int
    last: int
    measured_s: float | None = None
    _seconds: list[float] = field(default_factory=list, repr=False)

    def see(self, step: int, seconds: float) -> str | None:
        """Take note of a step; after the last one, a line for the log."""
        if self.measured_s is not None:
            return None
        self._seconds.append(seconds)
        if step < self.last:
            return None
        counted = self._seconds[min(SETTLING, len(self._seconds) // 2) :]
        if self.in_rounds:
            whole = len(counted) // self.sync_every * self.sync_every
            self.measured_s = fmean(counted[-whole:] if whole else counted)
        else:
            self.measured_s = median(counted)
        return self._verdict()

    def _verdict(self) -> str:
        assert self.measured_s is not None
        ratio = self.step_s / self.measured_s
        told = (
            f"{self.scheme}: predicted {self.step_s:.4g} s per step, measured {self.measured_s:.4g} s over "
            f"{len(self._seconds)} steps ({ratio:.2f})"
        )
        if abs(ratio - 1) > TOLERANCE:
            return (
                f"warning: scheme auto: {told}: off by more than {TOLERANCE:.0%}, so the choice may not be the best; "
                "probe again for longer (`commkit probe`) on the machines and with the load of training"
            )
        return f"scheme auto: {told}"

    def facts(self) -> dict[str, Any]:
        """For the summary of the run."""
        return {
            "chosen": self.scheme,
            "reason": self.reason,
            "predicted_step_seconds": self.step_s,
            "measured_step_seconds": self.measured_s,
        }

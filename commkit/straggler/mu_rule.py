"""Who is late: the mu-rule (Krishnan et al. 2023, section 2).

At ``1 + mu`` times the time of the fastest worker, everybody unfinished is a candidate straggler. If what was
recorded so far and these are a pattern for which decoding is guaranteed, the round closes without them; if not,
one after the other is waited for until it is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Fits(Protocol):
    """:meth:`commkit.straggler.Schedule.fits`."""

    def __call__(self, late: Collection[int], /) -> bool: ...


@dataclass(frozen=True)
class MuRule:
    """How long to wait for stragglers.

    Args:
        mu: tolerance; the paper uses 1. Smaller closes rounds earlier and calls more workers late, of whom
            those beyond the design are waited for anyhow.

    Raises:
        ValueError: a negative or non-finite ``mu``.
    """

    mu: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.mu < float("inf"):
            raise ValueError(f"mu={self.mu} must be >= 0 and finite; the paper uses 1")

    def deadline(self, fastest: float) -> float:
        """Seconds since the round began at which candidates are named, if the fastest took ``fastest``."""
        return (1 + self.mu) * fastest

    def close(self, seconds: Sequence[float], fits: Fits) -> tuple[float, frozenset[int]]:
        """When a round closes whose times are known, and who is late: what a coordinator does live.

        Args:
            seconds: each worker's time for its part, from the start of the round; inf: never.
            fits: of the schedule.

        Returns:
            Duration in seconds, and the late workers. inf, if it takes one that never finishes.
        """
        times = np.asarray(seconds, dtype=np.float64)
        order = np.argsort(times, kind="stable").tolist()
        deadline = self.deadline(float(times[order[0]]))
        done = int((times <= deadline).sum())
        late = set(order[done:])
        duration = deadline if late else float(times[order[-1]])
        for worker in order[done:]:
            if fits(late):
                break
            duration = float(times[worker])
            late.remove(worker)
        return duration, frozenset(late)

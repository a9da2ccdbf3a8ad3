"""When 0/1 Adam refreshes its variance, and when it synchronises: functions of the step alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class ZeroOneSchedule:
    """The two policies of 0/1 Adam (Lu et al. 2022, section 5). Steps count from 0.

    Args:
        var_freeze_step: from this step on the variance never changes and steps may be local; the end of the
            learning-rate warm-up, or a little later.
        var_update_scaler: kappa; the gap between refreshes of the variance doubles after so many of them.
        local_step_scaler: the interval between synchronisations doubles after so many steps.
        local_step_clipper: largest interval, in steps; 1 never skips a synchronisation.

    Raises:
        ValueError: one of them is below 1.
    """

    var_freeze_step: int
    var_update_scaler: int = 16
    local_step_scaler: int = 1000
    local_step_clipper: int = 16

    def __post_init__(self) -> None:
        for name in (
            "var_freeze_step",
            "var_update_scaler",
            "local_step_scaler",
            "local_step_clipper",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a number of steps >= 1")

    def refreshes(self, step: int) -> bool:
        """Whether the variance is refreshed by a dense all-reduce: gap j is 2^floor(j / kappa)."""
        return step < self.var_freeze_step and step in _refreshes(
            self.var_freeze_step, self.var_update_scaler
        )

    def is_local(self, step: int) -> bool:
        """Whether nothing is sent at this step."""
        offset = step - self.var_freeze_step
        if offset < 0:
            return False
        syncs = _first_syncs(self.local_step_scaler, self.local_step_clipper)
        if offset <= syncs[-1]:
            return offset not in syncs
        return (offset - syncs[-1]) % self.local_step_clipper != 0


@lru_cache
def _first_syncs(scaler: int, clipper: int) -> tuple[int, ...]:
    """Offsets of synchronisations until their interval has grown to ``clipper``: one follows the last as
    soon as the interval of its own time has passed, 2^floor(offset / scaler)."""
    syncs, offset, interval = [0], 0, 1
    while interval < clipper:
        offset += 1
        interval = min(2 ** min(offset // scaler, clipper.bit_length()), clipper)
        if offset - syncs[-1] >= interval:
            syncs.append(offset)
    return tuple(syncs)


@lru_cache
def _refreshes(end: int, scaler: int) -> frozenset[int]:
    steps, step, number = [], 0, 0
    while step < end:
        steps.append(step)
        step += 2 ** (number // scaler)
        number += 1
    return frozenset(steps)

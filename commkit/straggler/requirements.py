"""What schedules ask of their codes and settings."""

from __future__ import annotations

from typing import Any

from .codes import GradientCode
from .masks import members
from .models import Bursty


def enough(arrived: int, num_workers: int, num_stragglers: int, code: GradientCode | None) -> bool:
    """Whether the vectors of the workers ``arrived`` give the sum."""
    if arrived.bit_count() >= num_workers - num_stragglers:
        return True
    return code is not None and code.can_decode(members(arrived))


def check_pattern(num_workers: int, burst: int, rounds: int, stragglers: int) -> None:
    """
    Raises:
        ValueError: not a bursty pattern over these workers.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers={num_workers} must be >= 1")
    Bursty(burst, rounds, stragglers)
    if stragglers > num_workers:
        raise ValueError(f"stragglers={stragglers} must be <= num_workers={num_workers}")


def require_code(code: GradientCode | None, num_workers: int, num_stragglers: int) -> None:
    """
    Raises:
        ValueError: the code is for other numbers.
    """
    if code is None:
        return
    if code.num_workers != num_workers or code.num_stragglers < num_stragglers:
        raise ValueError(
            f"code is for num_workers={code.num_workers}, num_stragglers={code.num_stragglers}, but the "
            f"schedule needs {num_workers} and {num_stragglers}; build it with "
            f"make_code({num_workers}, {num_stragglers})"
        )


def need_code(code: GradientCode | None) -> GradientCode:
    if code is None:
        raise ValueError(
            "code=None: this schedule only counts; build it with a code to plan and decode"
        )
    return code


def require_same(saved: list[Any], own: list[Any]) -> None:
    """
    Raises:
        ValueError: the state was saved by another schedule.
    """
    if list(saved) != own:
        raise ValueError(
            f"the state is of schedule {list(saved)}, but this is {own}; build the one that was saved, or "
            "start at a step without open jobs"
        )

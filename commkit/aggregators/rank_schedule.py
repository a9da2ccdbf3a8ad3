"""The rank of a factorisation: one number, or a function of the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

Rank: TypeAlias = int | Sequence[Sequence[int]]
"""4 is rank 4 for good; ``[[0, 16], [1000, 4]]`` is rank 16 until step 999 and rank 4 from 1000 on."""


def checked(rank: Rank) -> Rank:
    """``rank``, a schedule as tuples.

    Raises:
        ValueError: a rank below 1, or a schedule that is not [step, rank] pairs with steps 0 < a < b ...
    """
    if isinstance(rank, int):
        if rank < 1:
            raise ValueError(f"rank={rank} must be >= 1; use for example 4")
        return rank
    pairs = tuple(tuple(pair) for pair in rank)
    steps = [pair[0] for pair in pairs if len(pair) == 2]
    if not pairs or len(steps) != len(pairs):
        raise ValueError(
            f"rank={rank!r} must be a number or [step, rank] pairs; use for example [[0, 16], [1000, 4]]"
        )
    if steps[0] != 0 or any(b <= a for a, b in pairwise(steps)):
        raise ValueError(
            f"rank={rank!r}: steps {steps} must begin with 0 and increase; use for example "
            "[[0, 16], [1000, 4]]"
        )
    if min(pair[1] for pair in pairs) < 1:
        raise ValueError(
            f"rank={rank!r}: every rank must be >= 1; use for example [[0, 16], [1000, 4]]"
        )
    return pairs


def rank_at(rank: Rank, step: int) -> int:
    """The rank that holds at ``step``."""
    if isinstance(rank, int):
        return rank
    return [of_stage for begin, of_stage in rank if begin <= step][-1]


def highest(rank: Rank) -> int:
    """The largest rank that the schedule ever reaches."""
    return rank if isinstance(rank, int) else max(of_stage for _, of_stage in rank)

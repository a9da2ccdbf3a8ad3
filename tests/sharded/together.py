"""Many small runs in one set of processes, since starting those takes longer than most of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch.distributed as dist

from ..harness import run_ranks

_told: dict[Hashable, list[Any]] = {}


def _each(
    rank: int, world_size: int, function: Callable[..., Any], cases: Sequence[tuple[Any, ...]]
) -> list[Any]:
    results = []
    for case in cases:
        dist.barrier()
        results.append(function(rank, world_size, *case))
    return results


def run_each(
    function: Callable[..., Any],
    world_size: int,
    cases: Sequence[tuple[Any, ...]],
    deadline_s: float = 240.0,
) -> list[list[Any]]:
    """``function(rank, world_size, *case)`` for each case, one after another on the same ranks: for each case the results
    in rank order. What was run before with the same arguments is not run again."""
    key = (function.__module__, function.__qualname__, world_size, repr(cases))
    if key not in _told:
        of_ranks = run_ranks(_each, world_size, function, list(cases), deadline_s=deadline_s)
        _told[key] = [list(of_case) for of_case in zip(*of_ranks, strict=True)]
    return _told[key]

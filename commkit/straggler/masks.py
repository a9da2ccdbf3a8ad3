"""Sets of workers as integers: bit i is worker i."""

from __future__ import annotations

from collections.abc import Iterable


def mask_of(workers: Iterable[int], num_workers: int) -> int:
    """The integer of a set of workers.

    Raises:
        ValueError: one of them is not in 0..num_workers - 1.
    """
    mask = 0
    for worker in workers:
        if not 0 <= worker < num_workers:
            raise ValueError(f"worker {worker} must be in 0..{num_workers - 1}")
        mask |= 1 << worker
    return mask


def members(mask: int) -> list[int]:
    """The workers of ``mask``, ascending."""
    workers = []
    while mask:
        low = mask & -mask
        workers.append(low.bit_length() - 1)
        mask ^= low
    return workers

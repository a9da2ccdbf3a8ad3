"""The mean of what the ranks sent of a tensor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def mean_of(rows: Sequence[Tensor]) -> Tensor:
    """Of one tensor of each rank, added up in rank order, in memory of its own. Divided first, as in an all-reduce: the sum
    may not exist where the mean does."""
    mean = rows[0].div(len(rows))
    for row in rows[1:]:
        mean.add_(row, alpha=1 / len(rows))
    return mean

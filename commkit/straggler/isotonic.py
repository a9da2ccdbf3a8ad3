"""Weighted least squares under monotonicity: of sequences, and of a table along its rows and columns."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def isotonic(values: Array, weights: Array, groups: npt.NDArray[np.int64] | None = None) -> Array:
    """The non-decreasing sequence nearest to ``values``, of each group apart: pool adjacent violators.

    All decreasing runs of a pass are pooled at once, which the order of pooling allows, so that many sequences
    cost a few operations on whole arrays.

    Args:
        values: ``(m,)``.
        weights: ``(m,)``, > 0: of the squared distances.
        groups: ``(m,)``, equal numbers side by side; None: all are one sequence.
    """
    if groups is None:
        groups = np.zeros(len(values), dtype=np.int64)
    means, masses, lengths = values, weights, np.ones(len(values), dtype=np.int64)
    while True:
        joined = (means[:-1] > means[1:]) & (groups[:-1] == groups[1:])
        if not joined.any():
            return np.repeat(means, lengths)
        starts = np.flatnonzero(np.concatenate(([True], ~joined)))
        sums = np.add.reduceat(means * masses, starts)
        masses = np.add.reduceat(masses, starts)
        lengths = np.add.reduceat(lengths, starts)
        means, groups = sums / masses, groups[starts]


def monotone_table(
    means: Array, weights: Array, sweeps: int = 20, tolerance: float = 1e-6
) -> Array:
    """The table nearest to ``means`` that does not decrease along rows nor increase down columns.

    Rows and columns are projected by turns, with Dykstra's corrections, which make the limit the nearest table and
    not just some monotone one. Cells of weight 0 are left out; the order among the others is kept as long as
    those of each row are a prefix of it.

    Args:
        means: ``(a, b)``.
        weights: ``(a, b)``, >= 0.
        sweeps: at most so many.
        tolerance: stop when no cell moves by more than this share of the largest.

    Returns:
        ``(a, b)``, NaN where the weight is 0.
    """
    known = weights > 0
    table = np.full(means.shape, np.nan)
    if not known.any():
        return table
    row, column = np.nonzero(known)
    down = np.lexsort((row, column))  # places of the known cells, column by column
    x, w = means[known], weights[known]
    across, along = np.zeros_like(x), np.zeros_like(x)
    least = tolerance * float(np.abs(x).max())
    for _ in range(sweeps):
        before = x
        y = isotonic(x + across, w, row)
        across = x + across - y
        x = np.empty_like(y)
        x[down] = -isotonic(-(y + along)[down], w[down], column[down])
        along = y + along - x
        if max(np.abs(x - before).max(), np.abs(x - y).max()) <= least:
            break
    table[known] = x
    return table

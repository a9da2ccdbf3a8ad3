"""How a code's matrix is inverted, and by how much that amplifies rounding errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_BATCH = 1000


def solutions(matrix: Array, num_stragglers: int) -> tuple[Array, Array]:
    """All ``a`` with ``a^T B = 1``, which are ``base + null @ c``.

    Args:
        matrix: B, ``(n, n)`` of rank n - s, with 1 in its row space.
        num_stragglers: s.

    Returns:
        ``(n,)``, the solution of smallest norm, and ``(n, s)``, an orthonormal basis of ``a^T B = 0``.
    """
    left, values, right = np.linalg.svd(matrix)
    rank = len(matrix) - num_stragglers
    base = left[:, :rank] @ (right[:rank].sum(axis=1) / values[:rank])
    return base, left[:, rank:]


def worst_amplification(matrix: Array, num_stragglers: int, max_sets: int = 20000) -> float:
    """The largest ``sum_i |a_i B_ij|`` over partitions j and sets of s stragglers; inf if one of the sets does
    not decode. If there are more than ``max_sets``, over runs of neighbours and a fixed sample."""
    base, null = solutions(matrix, num_stragglers)
    sets = np.array(list(_straggler_sets(len(matrix), num_stragglers, max_sets)), dtype=np.intp)
    absolute, worst = np.abs(matrix), 0.0
    for some in np.array_split(sets, math.ceil(len(sets) / _BATCH)):
        weights = np.tile(base, (len(some), 1))
        if num_stragglers:
            try:
                c = np.linalg.solve(null[some], -base[some][..., None])[..., 0]
            except np.linalg.LinAlgError:
                return math.inf
            weights += c @ null.T
            np.put_along_axis(weights, some, 0.0, axis=1)
        worst = max(worst, float((np.abs(weights) @ absolute).max()))
    return worst if math.isfinite(worst) else math.inf


def _straggler_sets(n: int, s: int, max_sets: int) -> Iterable[tuple[int, ...]]:
    if math.comb(n, s) <= max_sets:
        yield from itertools.combinations(range(n), s)
        return
    for i in range(n):
        yield tuple((i + j) % n for j in range(s))
    # The legacy generator: NumPy has promised that its streams never change.
    generator = np.random.RandomState(0)
    for _ in range(max_sets // 10):
        yield tuple(generator.permutation(n)[:s].tolist())

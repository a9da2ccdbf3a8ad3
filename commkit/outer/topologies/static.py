"""Graphs that are the same in every round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...registry import register
from .base import Matrix, Topology


class _Static(Topology):
    def period(self, n: int) -> int | None:
        return 1


@register("topology", "ring")
@dataclass(frozen=True)
class Ring(_Static):
    """A third of oneself and of each of two neighbours. Two messages of P elements per round however many
    ranks there are, but the gap falls as 13 / n^2: for small n, or slow wires along a line."""

    links_are_fixed: ClassVar[bool] = True

    def matrix(self, n: int, round: int) -> Matrix:
        if n <= 2:
            return np.full((n, n), 1 / n)
        return _circulant(n, [0, 1, -1])


@register("topology", "torus")
@dataclass(frozen=True)
class Torus(_Static):
    """A grid of ranks whose edges are joined: a fifth of oneself and of each of four neighbours; neighbours
    that coincide, in a grid two wide, have two fifths. Rank i is at row ``i // columns``.

    Args:
        rows: of the grid. Near-square grids mix fastest: 4 x 4 has three times the gap of 2 x 8.
        columns: rows * columns is the number of ranks.

    Raises:
        ValueError: a size below 1, or another number of ranks.
    """

    links_are_fixed: ClassVar[bool] = True
    rows: int
    columns: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise ValueError(
                f"rows={self.rows}, columns={self.columns} must be >= 1; use for example 2 and 4"
            )

    def matrix(self, n: int, round: int) -> Matrix:
        if n != self.rows * self.columns:
            raise ValueError(
                f"torus of rows={self.rows} x columns={self.columns} over {n} ranks: the product must be "
                f"{n}; choose rows and columns accordingly, or use ring"
            )
        matrix = np.zeros((n, n))
        for i in range(n):
            row, column = divmod(i, self.columns)
            for down, right in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):
                at = (row + down) % self.rows * self.columns + (column + right) % self.columns
                matrix[i, at] += 0.2
        return matrix


@register("topology", "exponential")
@dataclass(frozen=True)
class StaticExponential(_Static):
    """Every round, equal shares of oneself and of those 1, 2, 4, ... below n ranks before (Ying et al. 2021):
    a gap of 2 / (1 + log2 n) for log2 n messages. Directed: rank i sends to i + 2^k and receives from
    i - 2^k."""

    def matrix(self, n: int, round: int) -> Matrix:
        return _circulant(n, [0, *(-(2**k) for k in range(exponents(n)))])


@register("topology", "complete")
@dataclass(frozen=True)
class Complete(_Static):
    """The mean of all ranks: n - 1 messages, exact in one round. What the others are compared with."""

    def matrix(self, n: int, round: int) -> Matrix:
        return np.full((n, n), 1 / n)


def exponents(n: int) -> int:
    """ceil(log2 n): how many powers of two are below n."""
    return (n - 1).bit_length()


def _circulant(n: int, offsets: list[int]) -> Matrix:
    """Equal shares of the ranks at ``offsets`` from each."""
    matrix, rows = np.zeros((n, n)), np.arange(n)
    for offset in offsets:
        matrix[rows, (rows + offset) % n] += 1 / len(offsets)
    return matrix

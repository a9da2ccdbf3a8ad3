"""Graphs that the user draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ...registry import register
from .base import Matrix, Topology
from .connectivity import metropolis


class _Drawn(Topology):
    links_are_fixed: ClassVar[bool] = True
    edges: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges", tuple(tuple(edge) for edge in self.edges))

    def period(self, n: int) -> int | None:
        return 1

    def links(self, n: int) -> npt.NDArray[np.bool_]:
        """(n, n): element (b, a) of every edge [a, b].

        Raises:
            ValueError: an edge is not two different ranks below ``n``.
        """
        links = np.zeros((n, n), dtype=bool)
        for edge in self.edges:
            if len(edge) != 2 or edge[0] == edge[1] or not all(0 <= rank < n for rank in edge):
                raise ValueError(
                    f"edges: {list(edge)} must be two different ranks from 0 to {n - 1}, for example [0, 1]"
                )
            links[edge[1], edge[0]] = True
        return links


@register("topology", "graph")
@dataclass(frozen=True)
class Graph(_Drawn):
    """Any connected undirected graph, with Metropolis weights.

    Args:
        edges: pairs of ranks, e.g. ``[[0, 1], [1, 2]]`` is a line of three.

    Raises:
        ValueError: an edge out of range, or a graph that is not connected.
    """

    edges: Sequence[Sequence[int]]

    def matrix(self, n: int, round: int) -> Matrix:
        links = self.links(n)
        return metropolis(links | links.T)


@register("topology", "directed_graph")
@dataclass(frozen=True)
class DirectedGraph(_Drawn):
    """Any strongly connected directed graph, for push-sum alone: each rank deals itself and all that it sends
    to equal shares. Columns add up to 1, rows need not.

    Args:
        edges: [from, to] pairs of ranks, e.g. ``[[0, 1], [1, 2], [2, 0]]``.

    Raises:
        ValueError: an edge out of range, or ranks that cannot all reach each other.
    """

    edges: Sequence[Sequence[int]]

    def matrix(self, n: int, round: int) -> Matrix:
        mass = self.links(n) + np.eye(n)
        shares: Matrix = mass / mass.sum(0)
        return shares

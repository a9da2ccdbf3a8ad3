"""Which ranks can reach each other, and the weights that any undirected graph can have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def metropolis(links: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Metropolis-Hastings weights of an undirected graph: 1 / (1 + the larger degree) on each link, the rest
    on the rank itself. Symmetric and doubly stochastic, from what two neighbours know of each other.

    Args:
        links: (n, n), symmetric; the diagonal is ignored.
    """
    linked = links & ~np.eye(len(links), dtype=bool)
    degree = linked.sum(1)
    weights = np.where(linked, 1.0 / (1 + np.maximum.outer(degree, degree)), 0.0)
    np.fill_diagonal(weights, 1 - weights.sum(1))
    return weights


def components(links: npt.NDArray[np.bool_]) -> list[list[int]]:
    """The sets of nodes that can all reach each other along the links, each in order. In a directed graph:
    its strongly connected components."""
    ahead, back = _reachable(links), _reachable(links.T)
    mutual, left, found = ahead & back, set(range(len(links))), []
    while left:
        component = np.flatnonzero(mutual[min(left)]).tolist()
        found.append(component)
        left.difference_update(component)
    return found


def require_connected(links: npt.NDArray[np.bool_], ranks: Sequence[int], name: str) -> None:
    """Raise unless everybody can reach everybody.

    Raises:
        ValueError: it names the components.
    """
    parts = [[ranks[i] for i in part] for part in components(links)]
    if len(parts) > 1:
        raise ValueError(
            f"{name} is not connected: ranks {' and '.join(map(str, parts))} do not all reach each other, so "
            "their parameters would never agree; add links between them, or train them apart"
        )


def _reachable(links: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """(n, n): whether there is a path from i to j, found by doubling the paths' lengths."""
    reach: npt.NDArray[np.bool_] = links | np.eye(len(links), dtype=bool)
    for _ in range(len(links).bit_length()):
        reach = (reach.astype(np.float64) @ reach) > 0
    return reach

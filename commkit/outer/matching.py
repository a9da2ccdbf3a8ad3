"""Pairs along the links of any topology: each rank meets at most one neighbour at a time."""

from __future__ import annotations

import numpy as np

from .pairing import partners_of
from .permutation import permutation
from .topologies import Mixing
from .topologies.base import Matrix

_DRAWS = 1024


def draw_pairs(mixing: Mixing, seed: int, round_number: int) -> dict[int, int]:
    """Partner by rank, of those who have one: a maximal matching of the links of this round's matrix, in
    random order. A topology that makes pairs gets its own; on a ring half of the links at most are used at a time.
    Equal on every rank."""
    matrix = mixing.matrix(round_number)
    linked = np.triu((matrix + matrix.T) > 0, 1)
    edges = [(int(a), int(b)) for a, b in np.argwhere(linked)]
    chosen: list[tuple[int, int]] = []
    taken: set[int] = set()
    for k in permutation(seed, round_number, n=len(edges)):
        if taken.isdisjoint(edges[k]):
            chosen.append(edges[k])
            taken.update(edges[k])
    partners = partners_of(chosen, len(mixing.ranks))
    return {mixing.ranks[i]: mixing.ranks[j] for i, j in enumerate(partners) if i != j}


def meeting_rates(mixing: Mixing, seed: int, draws: int = _DRAWS) -> Matrix:
    """(n, n) float64: the share of rounds in which each pair meets, counted over the first ``draws``."""
    place = {rank: i for i, rank in enumerate(mixing.ranks)}
    counts = np.zeros((len(place), len(place)))
    for round_number in range(draws):
        for rank, partner in draw_pairs(mixing, seed, round_number).items():
            counts[place[rank], place[partner]] += 1
    return counts / draws

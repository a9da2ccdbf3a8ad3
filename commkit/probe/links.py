"""Latency and bandwidth between pairs of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from ..cost.run import timed
from ..outer.pairing import round_robin
from ..types import Comm
from .report import PairFound
from .sweep import sweep

Pair: TypeAlias = tuple[int, int]


def probe_pairs(
    comm: Comm, nodes: Sequence[int], device: torch.device, target_s: float, repeats: int
) -> list[PairFound]:
    """Each node's first rank with every other's, and the first two ranks of each node. Pairs that share no rank go at
    once, so that a node's link carries one at a time. Collective.

    Args:
        comm: of all ranks.
        nodes: by rank, the number of its node.
        device: of the messages.
        target_s, repeats: of the sweeps.

    Returns:
        The same on every rank.
    """
    found: list[PairFound] = []
    for pairs in meetings(nodes):
        mine = _meet(comm, pairs, nodes, device, target_s, repeats)
        told = comm.all_gather_object(None if mine is None else mine.model_dump())
        found += [PairFound.model_validate(one) for one in told if one is not None]
    return found


def meetings(nodes: Sequence[int]) -> list[list[Pair]]:
    """Rounds of disjoint pairs: first those inside nodes, then nodes against each other, each against each."""
    members: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        members.setdefault(node, []).append(rank)
    inside = [(ranks[0], ranks[1]) for ranks in members.values() if len(ranks) > 1]
    firsts = [ranks[0] for ranks in members.values()]
    number = len(firsts)
    between = [
        [(firsts[a], firsts[b]) for a, b in enumerate(round_robin(number, i)) if a < b]
        for i in range(number - 1 + number % 2)
    ]
    return [pairs for pairs in (inside, *between) if pairs]


def _meet(
    comm: Comm,
    pairs: Sequence[Pair],
    nodes: Sequence[int],
    device: torch.device,
    target_s: float,
    repeats: int,
) -> PairFound | None:
    """What the first rank of a pair found; None on all others. Collective over all ranks."""
    mine = next((pair for pair in pairs if comm.rank in pair), None)

    def message(size: int) -> float:
        if mine is None:
            return 0.0
        x = torch.zeros(size, dtype=torch.uint8, device=device)
        return timed(lambda: _there_and_back(comm, mine, x), device) / 2

    swept = sweep(message, comm, device, target_s, repeats)
    if mine is None or comm.rank != mine[0]:
        return None
    return PairFound(
        first=mine[0],
        second=mine[1],
        inside_node=nodes[mine[0]] == nodes[mine[1]],
        latency_s=swept.latency_s,
        bytes_per_second=swept.bytes_per_second,
        spread=swept.spread,
    )


def _there_and_back(comm: Comm, pair: Pair, x: torch.Tensor) -> None:
    first, second = pair
    if comm.rank == first:
        comm.exchange({second: x}, {})
        comm.exchange({}, {second: x})
    else:
        comm.exchange({}, {first: x})
        comm.exchange({first: x}, {})

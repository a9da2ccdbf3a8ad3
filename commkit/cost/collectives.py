"""How long a collective takes on a cluster, by the algorithm that carries it.

gloo's: rings for all-reduce, all-gather and (with an all-reduce's traffic) reduce-scatter, all messages at once for
all-to-all, a binomial tree for broadcast. Ranks of a node are neighbours in the ring, so that a ring crosses a node's
link once; where every rank has a peer elsewhere, all of them share it. :class:`~commkit.comm.DistComm` reduces less than
256 KiB in two messages instead of the ring's 2 (W - 1), which is not counted here: many ranks far apart take less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..sim.mirror import Op
from .cluster import Cluster, Link


@dataclass(frozen=True)
class Hops:
    """What a collective of one rank costs.

    Args:
        messages: that follow one another, each with its latency.
        link_bytes: that pass the slowest link one way, those of other ranks of the node included.
        wire_bytes: that this rank sends, wherever to.
        link: which one.
    """

    messages: float
    link_bytes: float
    wire_bytes: float
    link: Link

    @property
    def transfer_s(self) -> float:
        return self.link_bytes / self.link.bytes_per_second

    @property
    def seconds(self) -> float:
        return self.messages * self.link.latency_s + self.transfer_s


def hops(op: Op, scope: str, payload: float, cluster: Cluster) -> Hops:
    """
    Args:
        op: of a :class:`~commkit.sim.mirror.Call`.
        scope: likewise: "" for all ranks, "intra" for those of a node, "inter" for one of each node.
        payload: bytes that a rank hands over.

    Raises:
        ValueError: a scope that no cluster has.
    """
    found = _of_algorithm(op, scope, payload, cluster)
    latency, transfer = cluster.factors.get(op, (1.0, 1.0))
    return replace(found, messages=latency * found.messages, link_bytes=transfer * found.link_bytes)


def _of_algorithm(op: Op, scope: str, payload: float, cluster: Cluster) -> Hops:
    if scope not in ("", "intra", "inter"):
        raise ValueError(f"scope={scope!r} must be '', 'intra' or 'inter'")
    per_node = cluster.ranks_per_node
    ranks = {"": cluster.world_size, "intra": per_node, "inter": cluster.nodes}[scope]
    inside = scope == "intra" or cluster.nodes == 1
    link = cluster.local if inside else cluster.link
    if ranks == 1:
        return Hops(0, 0, 0, link)
    # Rings of all ranks cross a node's link once; one ring between nodes for each rank of a node shares it.
    rings = per_node if scope == "inter" and not inside else 1
    # Of what a rank sends to all others alike, the part that leaves the node; all its ranks send at once.
    leaving = (
        1.0 if inside else per_node * (1 if scope == "inter" else (ranks - per_node) / (ranks - 1))
    )
    share = (ranks - 1) / ranks
    if op == "all_reduce" or (op == "reduce_scatter" and cluster.backend == "gloo"):
        return Hops(2 * (ranks - 1), 2 * share * payload * rings, 2 * share * payload, link)
    if op == "reduce_scatter":
        return Hops(ranks - 1, share * payload * rings, share * payload, link)
    if op == "all_gather":
        sent = (ranks - 1) * payload
        return Hops(ranks - 1, sent * rings, sent, link)
    if op == "all_to_all":
        return Hops(1, share * payload * leaving, share * payload, link)
    if op == "broadcast":
        depth = math.ceil(math.log2(ranks))
        return Hops(depth, depth * payload * rings, share * payload, link)
    return Hops(1, payload * leaving, payload, link)  # exchange

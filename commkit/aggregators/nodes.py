"""Which ranks share a node, and the two comms that follow: inside a node, and between nodes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias
from weakref import WeakKeyDictionary

from torch.distributed.device_mesh import DeviceMesh

from ..types import Comm

Nodes: TypeAlias = Sequence[Sequence[int]]
"""The ranks of each node, the same number in all."""

INTRA, INTER = "intra", "inter"


@dataclass(frozen=True, slots=True)
class Placement:
    """One rank's two comms.

    Args:
        intra: the ranks of this rank's node; ``intra.rank`` is its local index.
        inter: the ranks of the same local index, one of each node.
    """

    intra: Comm
    inter: Comm


_placements: WeakKeyDictionary[Comm, dict[object, Placement]] = WeakKeyDictionary()


def placement(comm: Comm, local_size: int | None, nodes: Nodes | None) -> Placement:
    """Agree with all ranks of ``comm`` on the nodes and make the comms; once for each comm.

    Collective over ``comm`` the first time.

    Args:
        local_size: ranks per node, consecutive; None: from the environment's LOCAL_WORLD_SIZE.
        nodes: the ranks of each node instead, see :func:`nodes_of_mesh`.

    Raises:
        ValueError: on every rank: no size known to one of them, uneven nodes, or ranks that differ.
    """
    made = _placements.setdefault(comm, {})
    asked = (local_size, nodes)
    if asked not in made:
        agreed = _agree(comm, local_size, nodes)
        intra = comm.split(agreed, INTRA)
        inter = comm.split(list(zip(*map(sorted, agreed), strict=True)), INTER)
        made[asked] = Placement(intra, inter)
    return made[asked]


def nodes_of_mesh(mesh: DeviceMesh) -> list[list[int]]:
    """The nodes of a two-dimensional mesh of (node, local) ranks, for a process group over just its ranks.

    Raises:
        ValueError: not two dimensions.
    """
    if mesh.ndim != 2:
        raise ValueError(
            f"the mesh has {mesh.ndim} dimensions; give one of two, nodes and then ranks of a node: "
            'init_device_mesh(device, (nodes, local), mesh_dim_names=("node", "local"))'
        )
    rows: list[list[int]] = mesh.mesh.tolist()
    order = sorted(rank for row in rows for rank in row)  # as in a process group over them
    return [[order.index(rank) for rank in row] for row in rows]


def check_nodes(nodes: Nodes) -> tuple[tuple[int, ...], ...]:
    """``nodes`` as tuples.

    Raises:
        ValueError: nodes of different size, none, or empty ones.
    """
    if len({len(node) for node in nodes} - {0}) != 1 or not all(nodes):
        raise ValueError(
            f"nodes={[list(node) for node in nodes]} must all have the same number of ranks, at least one; "
            "give every node equally many, or leave the hierarchy out"
        )
    return tuple(tuple(node) for node in nodes)


def _agree(comm: Comm, local_size: int | None, nodes: Nodes | None) -> Nodes:
    """Every rank's view of the nodes is the same, or every rank raises."""
    mine, error = None, None
    try:
        mine = check_nodes(nodes) if nodes is not None else _consecutive(comm, local_size)
        if sorted(rank for node in mine for rank in node) != list(range(comm.world_size)):
            raise ValueError(
                f"nodes={[list(node) for node in mine]} must hold each of the ranks 0 to "
                f"{comm.world_size - 1} exactly once"
            )
    except ValueError as caught:
        error = str(caught)
    told = comm.all_gather_object((mine, error))
    for rank, (theirs, message) in enumerate(told):
        if message is not None:
            raise ValueError(message if error else f"rank {rank}: {message}")
        if theirs != told[0][0]:
            raise ValueError(
                f"ranks disagree on their nodes: rank 0 says {told[0][0]}, rank {rank} says {theirs}; start "
                "equally many ranks on every node, or give local_size"
            )
    assert mine is not None
    return mine


def _consecutive(comm: Comm, local_size: int | None) -> tuple[tuple[int, ...], ...]:
    size = local_size if local_size is not None else _local_world_size(comm.world_size)
    if size < 1 or comm.world_size % size:
        raise ValueError(
            f"local_size={size} does not divide the {comm.world_size} ranks into equal nodes; start equally "
            "many ranks on every node, or give a local_size that divides them"
        )
    return tuple(tuple(range(at, at + size)) for at in range(0, comm.world_size, size))


def _local_world_size(world_size: int) -> int:
    if world_size == 1:
        return 1
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    if not text.isdigit():
        raise ValueError(
            f"local_size is not given and LOCAL_WORLD_SIZE={text!r} is not a number; start with torchrun, or "
            "give local_size (ranks per node)"
        )
    return int(text)

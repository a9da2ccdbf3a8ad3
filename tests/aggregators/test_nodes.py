"""Which ranks share a node: one answer for all ranks, or a refusal on all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from commkit.aggregators import Hierarchical, Noop, PowerSGD
from commkit.aggregators.nodes import nodes_of_mesh, placement
from commkit.comm import DistComm
from commkit.schemes import powersgd
from commkit.sim import ThreadComm, run_threads
from tests.harness import run_ranks

from .inputs import contexts, sample


def places(
    world_size: int, local_size: int | None = None, nodes=None
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(rank, size) inside the node and between nodes, of every rank."""

    def body(comm: ThreadComm):
        place = placement(comm, local_size, nodes)
        assert placement(comm, local_size, nodes) is place
        return tuple((c.rank, c.world_size) for c in (place.intra, place.inter))

    return run_threads(body, world_size)


def test_nodes_are_consecutive_ranks() -> None:
    assert places(4, 2) == [((0, 2), (0, 2)), ((1, 2), (0, 2)), ((0, 2), (1, 2)), ((1, 2), (1, 2))]
    assert places(3, 1) == [((0, 1), (r, 3)) for r in range(3)]
    assert places(3, 3) == [((r, 3), (0, 1)) for r in range(3)]


def test_nodes_may_be_listed() -> None:
    expected = [((0, 2), (0, 2)), ((0, 2), (1, 2)), ((1, 2), (0, 2)), ((1, 2), (1, 2))]
    assert places(4, nodes=((0, 3), (1, 2))) == expected


def test_launchers_say_how_many_ranks_a_node_has(monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert places(4) == places(4, 2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert places(1) == [((0, 1), (0, 1))]


def refusals(ask: Callable[[ThreadComm], object], world_size: int = 4) -> set[str]:
    def body(comm: ThreadComm) -> str:
        try:
            ask(comm)
        except ValueError as error:
            return str(error)
        return "accepted"

    return set(run_threads(body, world_size))


@pytest.mark.parametrize(
    ("local_size", "nodes", "words"),
    [
        (3, None, "local_size=3 does not divide the 4 ranks into equal nodes; start"),
        (None, None, "LOCAL_WORLD_SIZE='' is not a number; start with torchrun, or give"),
        (None, ((0, 1), (2,)), "must all have the same number of ranks"),
        (None, ((0, 1), (2, 4)), "must hold each of the ranks 0 to 3 exactly once"),
        (None, ((0, 1), (1, 2)), "must hold each of the ranks 0 to 3 exactly once"),
    ],
)
def test_what_does_not_fit_is_refused_on_every_rank(monkeypatch, local_size, nodes, words) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    (message,) = refusals(lambda comm: placement(comm, local_size, nodes))
    assert words in message


def test_uneven_nodes_are_refused_on_every_rank() -> None:
    """One node of three ranks and one of one: each rank has been told another size."""
    told = refusals(lambda comm: placement(comm, 1 if comm.rank == 3 else 3, None))
    (message,) = {message.removeprefix("rank 0: ") for message in told}
    assert message.startswith("local_size=3 does not divide")
    told = refusals(lambda comm: placement(comm, 1 + comm.rank // 2, None))
    assert all("ranks disagree on their nodes: rank 0 says" in message for message in told)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Hierarchical(Noop(), local_size=0), "local_size=0 must be >= 1; use"),
        (lambda: Hierarchical(Noop(), local_size=2, nodes=[[0]]), "give one of them"),
        (lambda: Hierarchical(Noop(), nodes=[[0, 1], [2]]), "give every node equally many"),
        (lambda: Hierarchical(Noop(), nodes=[]), "give every node equally many"),
        (lambda: Hierarchical(Noop(), nodes=[[], []]), "give every node equally many"),
    ],
)
def test_settings_out_of_range_are_refused(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_preparing_reaches_the_scheme_between_nodes() -> None:
    xs = [sample((10, 20), 0)]
    (message,) = refusals(
        lambda comm: Hierarchical(PowerSGD(11), local_size=2).prepare(contexts(xs), comm)
    )
    assert "rank=11 is above" in message


def _over_gloo(rank: int, world_size: int) -> dict[str, object]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    comm = DistComm(dist.group.WORLD, timeout_s=30.0)
    nodes = nodes_of_mesh(mesh)
    place = placement(comm, None, tuple(map(tuple, nodes)))
    groups = len(dist.distributed_c10d._world.pg_map)
    again = placement(comm, None, tuple(map(tuple, nodes)))
    cached = again is place and len(dist.distributed_c10d._world.pg_map) == groups
    for _ in range(3):
        inside = place.intra.all_reduce(torch.tensor([float(rank)]))
        outside = place.inter.all_reduce(torch.tensor([float(rank)]))
    try:
        nodes_of_mesh(init_device_mesh("cpu", (4,)))
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    whole = comm.split([list(range(4))], "all")
    return {
        "nodes": nodes,
        "sums": (inside.item(), outside.item()),
        "cached": cached,
        "by_op": dict(comm.bytes.by_op),
        "refusal": refusal,
        "everybody": whole.group is comm.group and whole.bytes is comm.bytes,
    }


def test_groups_of_processes() -> None:
    for rank, seen in enumerate(run_ranks(_over_gloo, 4)):
        assert seen["nodes"] == [[0, 1], [2, 3]]
        assert seen["sums"] == ((1.0, 1.0, 5.0, 5.0)[rank], (2.0, 4.0, 2.0, 4.0)[rank])
        assert seen["by_op"] == {"intra/all_reduce": 12, "inter/all_reduce": 12}
        assert "one of two, nodes and then ranks of a node" in seen["refusal"]
        assert seen["cached"]
        assert seen["everybody"]


def test_a_flat_scheme_needs_no_nodes(monkeypatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    run_threads(lambda comm: powersgd().prepare({"w": sample((9, 9), 0)}, comm), 2)

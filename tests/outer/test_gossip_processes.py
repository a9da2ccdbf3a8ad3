"""The methods without a collective on real processes over gloo."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import commkit
from commkit.compressors import BlockQuantize
from commkit.outer import A2CiD2, GossipSGD, MoNNA, NoLoCo, OuterSync, PushSum
from commkit.outer.decentralised import Decentralised
from commkit.outer.topologies import Ring, StaticExponential
from tests.harness import run_ranks
from tests.outer.problem import Net, assert_same, inner_step, weights

METHODS: dict[str, Any] = {
    "noloco": functools.partial(NoLoCo, sync_every=2),
    "noloco_both": functools.partial(NoLoCo, sync_every=2, gamma=0.9, strict=True),
    "noloco_int8": functools.partial(NoLoCo, sync_every=2, compressor=BlockQuantize()),
    "gossip": functools.partial(GossipSGD, sync_every=2, topology=Ring()),
    "gossip_pairs": GossipSGD,
    "gossip_overlap": functools.partial(
        GossipSGD, sync_every=2, topology=StaticExponential(), overlap=True
    ),
    "push_sum": functools.partial(PushSum, sync_every=2),
    "a2cid2": A2CiD2,
    "monna": functools.partial(MoNNA, num_faulty=0, momentum=0.9, sync_every=2),
}
EVERY = pytest.mark.parametrize("name", METHODS)


def _made(rank: int, name: str) -> tuple[torch.nn.Module, torch.optim.Optimizer, Decentralised]:
    model = Net(rank)
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    outer = METHODS[name](model, inner)
    assert isinstance(outer, Decentralised)
    outer.start()
    return model, inner, outer


def _rounds_of(outer: OuterSync) -> set[str]:
    """Kinds of operations on the worker's group but for the broadcast of the first weights."""
    return set(outer._private_comm.bytes.by_op) - {"broadcast"}


def _trained(rank: int, world_size: int, name: str) -> tuple[dict[str, Tensor], bool]:
    model, inner, outer = _made(rank, name)
    for step in range(7):
        inner_step(model, inner, rank, step)
    assert _rounds_of(outer) <= {"exchange"}
    apart = name == "monna" or outer.consensus_distance() > 0
    outer.close()
    assert _rounds_of(outer) == {"exchange"}
    return weights(model), apart


def _all(
    rank: int, world_size: int, names: list[str], body: Callable[..., Any], *args: Any
) -> dict[str, Any]:
    """``body`` of one method after another, in the same processes."""
    return {name: body(rank, world_size, name, *args) for name in names}


@pytest.fixture(scope="module")
def trained() -> list[dict[str, Any]]:
    return run_ranks(_all, 3, list(METHODS), _trained)


@EVERY
def test_replicas_train_without_collectives_and_merge(
    name: str, trained: list[dict[str, Any]]
) -> None:
    results = [of_rank[name] for of_rank in trained]
    assert any(apart for _, apart in results)
    for after, _ in results:
        assert name == "monna" or assert_same(after, results[0][0]) is None
        assert all(bool(x.isfinite().all()) for x in after.values())


def _with_a_death(rank: int, world_size: int, name: str) -> Any:
    model, inner, outer = _made(rank, name)
    for step in range(16):
        if rank == 2 and step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        inner_step(model, inner, rank, step)
    before = weights(model)
    outer.close()
    return before, weights(model), outer.peers.missed, outer.peers.lost


@pytest.mark.parametrize("name", ["gossip", "gossip_overlap", "monna", "noloco", "push_sum"])
def test_survivors_of_a_killed_rank_go_on(name: str) -> None:
    """Without being told, and nobody is rebuilt; the merge at the end is over those who are left."""
    one, other, dead, last = run_ranks(_with_a_death, 4, name, dying=[2])
    assert dead is None
    survivors = [one, other, last]
    assert sum(missed for _, _, missed, _ in survivors) > 0
    for before, after, _, lost in survivors:
        assert lost <= {2}
        if name == "monna":
            continue
        assert lost == {2}
        assert_same(after, one[1])
        for key in before:
            mean = torch.stack([each[0][key] for each in survivors]).mean(0)
            # Push-sum averages by mass; overlap has had something in flight.
            if name not in ("push_sum", "gossip_overlap"):
                torch.testing.assert_close(after[key], mean, rtol=1e-5, atol=1e-5)


def _in_the_middle_of_its_announcement(rank: int, world_size: int) -> set[int]:
    """Rank 1 dies after the first step of a round, when anchors are on their way."""
    model, inner, outer = _made(rank, "noloco_both")
    for step in range(9):
        inner_step(model, inner, rank, step)
        if rank == 1 and step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
    outer.close()
    return outer.peers.lost


def test_a_death_while_anchors_travel() -> None:
    one, dead, last = run_ranks(_in_the_middle_of_its_announcement, 3, dying=[1])
    assert dead is None
    assert one == last == {1}


def _rebuilt(rank: int, world_size: int) -> dict[str, Tensor]:
    """Survivors may agree on a new group, over which the topology is laid out anew."""
    model, inner, outer = _made(rank, "gossip")
    for step in range(6):
        inner_step(model, inner, rank, step)
    outer.rebuild(dist.new_group([0, 1, 3], use_local_synchronization=True))
    for step in range(6, 10):
        inner_step(model, inner, rank, step)
    assert outer.ranks == (0, 1, 2)
    outer.close()
    return weights(model)


def _leaving(rank: int, world_size: int) -> Any:
    if rank != 2:
        return _rebuilt(rank, world_size)
    model, inner, outer = _made(rank, "gossip")
    for step in range(6):
        inner_step(model, inner, rank, step)
    outer.close(finish=False)
    return None


def test_a_group_of_other_ranks() -> None:
    one, other, _, last = run_ranks(_leaving, 4)
    assert_same(one, other)
    assert_same(one, last)


def _contents(rank: int, name: str) -> tuple[Any, Any, Any, dict[str, Any]]:
    model, inner, outer = _made(rank, name)
    contents = {
        "replicated": {"method": outer},
        "per_rank": {"model": model, "optimizer": inner, "replica": outer.replica_state},
        "reducer": outer.reducer,
        "comm": outer.comm,
    }
    return model, inner, outer, contents


def _saved(rank: int, world_size: int, name: str, parent: str) -> dict[str, Tensor]:
    """Saves in the middle of a round, and goes on."""
    directory = f"{parent}/{name}"
    model, inner, outer, contents = _contents(rank, name)
    for step in range(10):
        if step == 5:
            commkit.checkpoint.save(directory, **contents)
        inner_step(model, inner, rank, step)
    after = weights(model)
    outer.close()
    return after


def _resumed(rank: int, world_size: int, name: str, parent: str) -> Any:
    directory = f"{parent}/{name}"
    model, inner, outer, contents = _contents(rank, name)
    inner_step(model, inner, rank, 99)  # leaves an announcement on its way
    commkit.checkpoint.load(directory, **contents)
    loaded = weights(model)
    for step in range(5, 10):
        inner_step(model, inner, rank, step)
    after = weights(model)
    outer.close()
    return loaded, after


SAVED = ["noloco_both", "gossip_overlap", "push_sum", "a2cid2", "monna"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], ...]:
    """What unbroken runs, resumed ones, and resumed ones of two ranks come to."""
    directory = str(tmp_path_factory.mktemp("checkpoints"))
    unbroken = run_ranks(_all, 3, SAVED, _saved, directory)
    return (
        unbroken,
        run_ranks(_all, 3, SAVED, _resumed, directory),
        run_ranks(_all, 2, SAVED, _resumed, directory),
    )


@pytest.mark.parametrize("name", SAVED)
def test_checkpoints_resume_bit_for_bit(name: str, saved: tuple[list[dict[str, Any]], ...]) -> None:
    unbroken, resumed, of_two = ([result[name] for result in results] for results in saved)
    for mine, (_, theirs) in zip(unbroken, resumed, strict=True):
        assert_same(mine, theirs)
    # Of another size: all start from the first rank's.
    assert_same(of_two[0][0], of_two[1][0])
    if name.startswith("gossip"):
        assert_same(of_two[0][0], resumed[0][0])

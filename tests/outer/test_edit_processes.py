"""EDiT on real processes over gloo: plain replicas, and replicas that FSDP2 shards."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import commkit
from commkit.outer import RoundAborted, SyncOptions
from commkit.outer.a_edit import AEDiT
from commkit.outer.diloco import DiLoCo
from commkit.outer.edit import EDiT
from commkit.outer.penalty import Penalty
from tests.harness import run_ranks
from tests.outer.deep import Deep, inner_step, loss_of
from tests.outer.problem import assert_same, weights

Weights = dict[str, Tensor]
# What FSDP gathers together: the root with what no block holds, and each block.
AS_SHARDED = ["", "blocks.0", "blocks.1", "blocks.2"]
SPOILED = "blocks.1.up.weight"


def _mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def _sharded(mesh: DeviceMesh, seed: int) -> Deep:
    model = Deep(seed)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    return model


def _whole(model: torch.nn.Module) -> Weights:
    return {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for n, p in model.named_parameters()
    }


def _adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def _spoil(model: torch.nn.Module, value: float) -> None:
    """Change the last row alone, which the last shard holds."""
    with torch.no_grad():
        p = model.get_parameter(SPOILED)
        if isinstance(p, DTensor):
            if p.device_mesh.get_local_rank() == 1:
                p.to_local()[-1].add_(value)
        else:
            p[-1].add_(value)


def _train(
    model: Deep, outer: EDiT | DiLoCo, replica: int, steps: int, variant: str
) -> tuple[list[float], list[Any]]:
    losses, rosters = [], []
    with outer:
        for step in range(steps):
            if variant == "spike" and step in (21, 25) and replica == 1:
                _spoil(model, 1e3)
            if variant == "nan" and step == 21 and replica == 1:
                _spoil(model, float("nan"))
            if variant == "evaluated":
                model.eval()
                with torch.no_grad():
                    loss_of(model, replica, 7)
                model.train()
            outer.optimizer.zero_grad()
            for micro in range(2 if variant == "accumulated" else 1):
                loss = loss_of(model, replica, 100 * micro + step)
                loss.backward()
                losses.append(loss.item())
            outer.optimizer.step()
            if isinstance(outer, EDiT):
                rosters.append([roster.weights for roster in outer._rosters])
    return losses, rosters


PENALTY = Penalty(warm_rounds=6, clip=0.2)
STEPS = {"spike": 30, "nan": 26}  # until the detector is warm, and after
VARIANTS = ["plain", "spike", "nan", "evaluated", "accumulated", "ahead", "no reshard", "int8"]


def _method(variant: str) -> dict[str, Any]:
    return {
        "sync_every": 2,
        "penalty": PENALTY,
        "reducer": commkit.schemes.int8(min_numel=0) if variant == "int8" else None,
        "options": SyncOptions(warmup_steps=3),
    }


def _on_shards(rank: int, world_size: int) -> dict[str, Any]:
    mesh = _mesh()
    return {variant: _one_on_shards(rank, mesh, variant) for variant in VARIANTS}


def _one_on_shards(rank: int, mesh: DeviceMesh, variant: str) -> Any:
    model = _sharded(mesh, seed=rank // 2)
    if variant == "ahead":
        model.set_modules_to_forward_prefetch([model.blocks[0], model.blocks[1]])  # type: ignore
        model.blocks[0].set_modules_to_forward_prefetch([model.blocks[1], model.blocks[2]])  # type: ignore
    if variant == "no reshard":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(False)
    outer = EDiT(
        model,
        _adamw(model),
        process_group=mesh["replicate"].get_group(),
        **_method(variant),
    )
    losses, rosters = _train(model, outer, rank // 2, STEPS.get(variant, 11), variant)
    return losses, rosters, _whole(model), outer.rejected


def _unsharded(rank: int, world_size: int) -> dict[str, Any]:
    return {variant: _one_unsharded(rank, variant) for variant in VARIANTS}


def _one_unsharded(rank: int, variant: str) -> Any:
    model = Deep(rank)
    outer = EDiT(model, _adamw(model), layers=AS_SHARDED, **_method(variant))
    losses, rosters = _train(model, outer, rank, STEPS.get(variant, 11), variant)
    return losses, rosters, weights(model), outer.rejected


@pytest.fixture(scope="module")
def both() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What four ranks of two sharded replicas, and two ranks of whole ones, come to."""
    return run_ranks(_on_shards, 4, deadline_s=200), run_ranks(_unsharded, 2, deadline_s=100)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sharded_replicas_do_what_whole_ones_do(
    variant: str, both: tuple[list[dict[str, Any]], list[dict[str, Any]]]
) -> None:
    """Losses too: a layer that was gathered before it was synchronised would show there."""
    sharded, whole = ([result[variant] for result in results] for results in both)
    for rank, (losses, rosters, state, rejected) in enumerate(sharded):
        assert rosters == sharded[0][1]  # on every shard of every replica
        assert_same(state, sharded[0][2])
        expected = whole[rank // 2]
        if variant == "int8":  # blocks are cut in shards
            continue
        assert losses == pytest.approx(expected[0], rel=1e-4, nan_ok=True)
        assert rejected == expected[3]
        for mine, theirs in zip(rosters, expected[1], strict=True):
            for a, b in zip(mine, theirs, strict=True):
                assert a == pytest.approx(b, abs=1e-5)
                assert [x == 0 for x in a] == [x == 0 for x in b]
        for name, value in expected[2].items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)
    if variant in ("spike", "nan"):
        zero = [weights[1] for at_step in sharded[0][1] for weights in at_step[2:3]]
        assert 0.0 in zero
        assert sharded[2][3] == sharded[3][3] >= (2 if variant == "spike" else 1)


def _diloco_on_shards(rank: int, world_size: int, bad: float) -> Any:
    mesh = _mesh()
    model = _sharded(mesh, seed=rank // 2)
    outer = DiLoCo(model, _adamw(model), sync_every=3, process_group=mesh["replicate"].get_group())
    with outer:
        for step in range(6):
            if step == 4 and rank // 2 == 1:
                _spoil(model, bad)
            inner_step(model, outer.optimizer, rank // 2, step)
            reset = outer.was_reset
    return _whole(model), reset


def _diloco(rank: int, world_size: int, bad: float) -> Any:
    model = Deep(rank)
    outer = DiLoCo(model, _adamw(model), sync_every=3)
    with outer:
        for step in range(6):
            if step == 4 and rank == 1:
                _spoil(model, bad)
            inner_step(model, outer.optimizer, rank, step)
    return weights(model)


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_other_methods_work_on_shards_too(bad: float) -> None:
    expected = run_ranks(_diloco, 2, bad)[0]
    for rank, (state, was_reset) in enumerate(run_ranks(_diloco_on_shards, 4, bad)):
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)
        assert was_reset == (bad != 0.0 and rank // 2 == 1)


class _Clock:
    """The second replica's steps take four times as long. Clocks of a replica's ranks disagree, and those of
    replicas all the more."""

    def __init__(self, rank: int) -> None:
        self.rank, self.steps = rank, 0

    def __call__(self) -> float:
        seconds = self.steps * (0.04 if self.rank // 2 == 1 else 0.01)
        return seconds * (1.0 + 0.3 * (self.rank % 2)) + 1e6 * self.rank


def _by_the_clock(rank: int, world_size: int) -> tuple[Weights, int]:
    mesh = _mesh()
    model = _sharded(mesh, seed=0)
    outer = AEDiT(
        model,
        _adamw(model),
        sync_seconds=0.1,
        min_total_steps=2,
        process_group=mesh["replicate"].get_group(),
    )
    clock = outer.clock = _Clock(rank)
    with outer:
        for step in range([60, 60, 15, 15][rank]):
            clock.steps += 1
            inner_step(model, outer.optimizer, rank // 2, step)
    return _whole(model), outer.round


def test_a_clock_per_sharded_replica() -> None:
    results = run_ranks(_by_the_clock, 4)
    for state, rounds in results:
        assert_same(state, results[0][0])
        assert rounds == results[0][1] >= 3 * 4


def _islands(rank: int, world_size: int) -> tuple[Weights, Weights, int]:
    """Two islands of two ranks: DDP inside, EDiT and A-EDiT between ranks of the same place."""
    inside = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    between = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]

    def island() -> DistributedDataParallel:
        return DistributedDataParallel(Deep(rank), process_group=inside)

    model = island()
    with EDiT(model, _adamw(model), sync_every=2, process_group=between) as edit:
        for step in range(5):
            inner_step(model, edit.optimizer, rank, step)
    state, model = weights(model.module), island()
    timed = AEDiT(model, _adamw(model), sync_seconds=0.1, min_total_steps=2, process_group=between)
    clock = timed.clock = _Clock(rank)
    with timed:
        for step in range([60, 60, 15, 15][rank]):
            clock.steps += 1
            inner_step(model, timed.optimizer, rank, step)
    return state, weights(model.module), timed.round


def test_islands_with_ddp_inside() -> None:
    results = run_ranks(_islands, 4)
    for state, timed, rounds in results:
        assert_same(state, results[0][0])
        assert_same(timed, results[0][1])
        assert rounds == results[0][2] >= 3 * 5


def _refusals(rank: int, world_size: int) -> None:
    mesh = _mesh()
    model = _sharded(mesh, seed=0)
    with pytest.raises(RuntimeError, match="hold different shards of one replica"):
        EDiT(model, _adamw(model)).start()
    with pytest.raises(ValueError, match="leave it out"):
        EDiT(model, _adamw(model), layers=["stem"])
    hybrid = Deep(0)
    fully_shard(hybrid, mesh=mesh)
    with pytest.raises(ValueError, match="give fully_shard the shard axis alone"):
        EDiT(hybrid, _adamw(hybrid))
    partly = Deep(0)
    fully_shard(partly.blocks[0], mesh=mesh["shard"])
    with pytest.raises(ValueError, match="some parameters are sharded and others not"):
        EDiT(partly, _adamw(partly))


def test_refusals() -> None:
    run_ranks(_refusals, 4)


def _with_a_death(rank: int, world_size: int) -> Weights:
    model = Deep(rank)
    inner = _adamw(model)
    outer = EDiT(model, inner, sync_every=3).start()
    for step in range(5):
        inner_step(model, inner, rank, step)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    inner_step(model, inner, rank, 5)  # after which a round is due
    with pytest.raises(RoundAborted, match="on_abort"):
        loss_of(model, rank, 6)
    outer.rebuild(dist.new_group([0, 2], use_local_synchronization=True))
    assert outer.state_dict()["detectors"]["count"][:, 0].tolist() == [1, 1]
    for step in range(7, 12):
        inner_step(model, inner, rank, step)
    outer.close()
    return weights(model)


def test_survivors_of_a_killed_rank_go_on() -> None:
    one, dead, other = run_ranks(_with_a_death, 3, dying=[1])
    assert dead is None
    assert_same(one, other)


def _resumable(rank: int) -> tuple[Deep, EDiT, dict[str, Any]]:
    model = Deep(rank)
    inner = _adamw(model)
    outer = EDiT(
        model,
        inner,
        sync_every=2,
        penalty=Penalty(warm_rounds=2),
        reducer=commkit.schemes.int4(min_numel=0),
    ).start()
    contents: dict[str, Any] = {
        "replicated": {"method": outer},
        "per_rank": {"model": model, "optimizer": inner},
        "reducer": outer.reducer,
        "comm": outer.comm,
    }
    return model, outer, contents


STOPS = (4, 5)


def _unbroken(rank: int, world_size: int, parent: str) -> list[Weights]:
    return [_one_unbroken(rank, f"{parent}/{stop}", stop) for stop in STOPS]


def _one_unbroken(rank: int, directory: str, stop: int) -> Weights:
    model, outer, contents = _resumable(rank)
    for step in range(9):
        if step == stop:
            commkit.checkpoint.save(directory, **contents)
        inner_step(model, outer.optimizer, rank, step)
    outer.close()
    return weights(model)


def _continued(rank: int, world_size: int, parent: str) -> list[Weights]:
    return [_one_continued(rank, f"{parent}/{stop}", stop) for stop in STOPS]


def _one_continued(rank: int, directory: str, stop: int) -> Weights:
    model, outer, contents = _resumable(rank)
    commkit.checkpoint.load(directory, **contents)
    for step in range(stop, 9):
        inner_step(model, outer.optimizer, rank, step)
    outer.close()
    return weights(model)


def test_checkpoints(tmp_path: Path) -> None:
    """With a round due, and in the middle of one."""
    unbroken = run_ranks(_unbroken, 2, str(tmp_path))
    resumed = run_ranks(_continued, 2, str(tmp_path))
    one, *others = run_ranks(_continued, 3, str(tmp_path))
    for place in range(len(STOPS)):
        for mine, theirs in zip(unbroken, resumed, strict=True):
            assert_same(mine[place], theirs[place])
        for other in others:
            assert_same(one[place], other[place])

"""Local updates on real processes over gloo."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commkit
from commkit.outer import DiLoCo, OuterSync, RoundAborted, SyncOptions
from tests.harness import run_ranks
from tests.outer.problem import Net, assert_same, inner_step, weights

SCHEMES: dict[str, dict[str, Any]] = {
    "diloco": {"name": "diloco", "sync_every": 3},
    "local_sgd": {"name": "local_sgd", "sync_every": 3},
    "int4": {"name": "diloco", "sync_every": 3, "reducer": {"name": "int4", "min_numel": 0}},
}


def _inner(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def _attached(rank: int, world_size: int) -> dict[str, dict[str, torch.Tensor]]:
    ends = {}
    for name, scheme in SCHEMES.items():
        model = Net(rank)
        inner = _inner(model)
        handle = commkit.attach(model, scheme, inner)
        for step in range(7):
            inner_step(model, inner, rank, step)
        handle.close()
        ends[name] = weights(model)
    return ends


def test_replicas_end_bit_equal() -> None:
    results = run_ranks(_attached, 3)
    for other in results[1:]:
        for name in SCHEMES:
            assert_same(results[0][name], other[name])


def _under_ddp(rank: int, world_size: int) -> str:
    model = Net(0)
    ddp = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match="averages gradients over ranks") as error:
        DiLoCo(model, _inner(model)).start()
    with pytest.raises(RuntimeError, match="give DiLoCo the plain module"):
        commkit.attach(ddp, "diloco", _inner(model))
    return str(error.value)


def test_a_ddp_over_replicas_is_refused() -> None:
    run_ranks(_under_ddp, 2)


def _islands(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Two islands of two ranks: DDP inside, DiLoCo between ranks of the same place."""
    inside = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    between = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    ddp = DistributedDataParallel(Net(rank), process_group=inside)
    inner = _inner(ddp)
    with DiLoCo(ddp, inner, sync_every=2, process_group=between):
        for step in range(4):
            inner_step(ddp, inner, rank, step)
    return weights(ddp.module)


def test_islands_with_ddp_inside() -> None:
    results = run_ranks(_islands, 4)
    for other in results[1:]:
        assert_same(results[0], other)


def _with_a_death(rank: int, world_size: int, policy: Any) -> dict[str, torch.Tensor]:
    model = Net(rank)
    inner = _inner(model)
    options = SyncOptions(on_abort=policy)
    outer = DiLoCo(model, inner, sync_every=3, options=options).start()
    step, committed = 0, weights(model)
    for step in range(5):
        inner_step(model, inner, rank, step)
        if step == 2:
            committed = weights(model)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RoundAborted, match="on_abort"):
        inner_step(model, inner, rank, 5)
    same = all(torch.equal(x, committed[name]) for name, x in weights(model).items())
    assert same == (policy == "rollback")
    outer.rebuild(dist.new_group([0, 1, 3], use_local_synchronization=True))
    for step in range(6, 9):
        inner_step(model, inner, rank, step)
    outer.close()
    assert outer.comm.world_size == 3
    return weights(model)


@pytest.mark.parametrize("policy", ["keep_local", "rollback"])
def test_survivors_of_a_killed_rank_go_on(policy: str) -> None:
    one, other, dead, last = run_ranks(_with_a_death, 4, policy, dying=[2])
    assert dead is None
    assert_same(one, other)
    assert_same(one, last)


def _saved(rank: int, world_size: int, directory: str, stop: int) -> dict[str, torch.Tensor]:
    """Saves after ``stop`` steps, and goes on."""
    model, outer, contents = _resumable(rank)
    for step in range(8):
        if step == stop:
            commkit.checkpoint.save(directory, **contents)
        inner_step(model, outer.optimizer, rank, step)
    outer.close()
    return weights(model)


def _resumable(rank: int) -> tuple[torch.nn.Module, OuterSync, dict[str, Any]]:
    model = Net(rank)
    inner = _inner(model)
    outer = DiLoCo(model, inner, sync_every=3, reducer=commkit.schemes.int4(min_numel=0)).start()
    return (
        model,
        outer,
        {
            "replicated": {"method": outer},
            "per_rank": {"model": model, "optimizer": inner},
            "reducer": outer.reducer,
            "comm": outer.comm,
        },
    )


def _continued(
    rank: int, world_size: int, directory: str, steps: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model, outer, contents = _resumable(rank)
    commkit.checkpoint.load(directory, **contents)
    loaded = weights(model)
    residuals = {k: v for k, v in outer.reducer.state_dict().items() if k.startswith("rank/")}
    for step in range(steps, 8):
        inner_step(model, outer.optimizer, rank, step)
    outer.close()
    return loaded, weights(model), residuals


def test_checkpoints_in_the_middle_of_a_round(tmp_path: Path) -> None:
    directory = str(tmp_path / "checkpoint")
    unbroken = run_ranks(_saved, 2, directory, 5)
    resumed = run_ranks(_continued, 2, directory, 5)
    for mine, (_, theirs, _) in zip(unbroken, resumed, strict=True):
        assert_same(mine, theirs)
    # Another number of ranks starts from the anchors, and from the mean residual.
    results = run_ranks(_continued, 3, directory, 5)
    for loaded, after, _ in results[1:]:
        assert_same(loaded, results[0][0])
        assert_same(after, results[0][1])
    old = [state for _, _, state in resumed]  # as loaded
    assert old[0]
    for key, mean in results[0][2].items():
        torch.testing.assert_close(mean, (old[0][key] + old[1][key]) / 2)

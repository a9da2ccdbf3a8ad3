"""DDP over nodes: four processes as two nodes of two."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import commkit
from commkit import checkpoint
from commkit.runtime.plain_metadata import PlainReader
from tests.adapters import problem
from tests.harness import run_ranks

FULL = {
    "name": "compose",
    "aggregator": {"name": "all_reduce", "compressor": "none"},
    "policy": {"min_numel": 0},
}
# Nothing dense: gloo sums over four ranks depend on where a tensor lies, those over two do not.
SCHEMES = {"powersgd": {"name": "powersgd", "rank": 2}, "sign": {"name": "sign", "min_numel": 0}}


def _attached(net: DDP, scheme: Any, local_size: int = 2) -> commkit.Handle:
    return commkit.attach(net, {"name": "hierarchical", "scheme": scheme}, local_size=local_size)


def _trains(rank: int, world_size: int) -> dict[str, Any]:
    plain = DDP(problem.model().double())
    problem.train(plain, range(8), rank)
    full = DDP(problem.model().double(), bucket_cap_mb=0.02)
    handle = _attached(full, FULL)
    groups = len(dist.distributed_c10d._world.pg_map)
    problem.train(full, range(8), rank)
    seen: dict[str, Any] = {
        "full precision": (problem.parameters(full) - problem.parameters(plain)).abs().max().item(),
        "groups at attach": len(dist.distributed_c10d._world.pg_map) == groups,
        "equal": problem.replicas_equal(full),
    }
    handle.close()
    for name, block in SCHEMES.items():
        results = []
        for cap in (0.02, 1000.0):
            net = DDP(problem.model(), bucket_cap_mb=cap)
            handle = _attached(net, block)
            losses = problem.train(net, range(40), rank)
            results.append(problem.parameters(net))
            last = handle.last_step
            seen[name] = (
                problem.replicas_equal(net),
                sum(losses[-5:]) / 5 / losses[0],
                (last.wire_bytes, last.inter_node_bytes, last.residual_norm),
            )
            handle.close()
        seen[f"{name} in buckets"] = torch.equal(*results)
    return seen


def test_nodes_train_together() -> None:
    runs = run_ranks(_trains, 4, deadline_s=100.0)
    for seen in runs:
        assert seen["full precision"] < 1e-12  # float64, parameters of about 1
        assert seen["groups at attach"]
        assert seen["equal"]
        for name in SCHEMES:
            equal, ratio, (wire, inter, residual) = seen[name]
            assert equal
            assert ratio < 0.8
            assert 0 < inter < wire / 4
            assert residual > 0
            assert seen[f"{name} in buckets"]


def _bad_step(rank: int, world_size: int, bad_rank: int) -> list[bool]:
    net = DDP(problem.model(), bucket_cap_mb=0.02)
    handle = _attached(net, SCHEMES["powersgd"])
    problem.train(net, range(3), rank)
    before = {key: x.clone() for key, x in handle.state_dict().items()}
    x, y = problem.batch(3, rank)
    if rank == bad_rank:
        x[0, 0] = torch.inf
    net.zero_grad()
    torch.nn.functional.mse_loss(net(x), y).backward()
    bad = [p.grad is not None and not bool(p.grad.isfinite().all()) for p in net.parameters()]
    after = handle.state_dict()
    untouched = all(torch.equal(before[k], after[k]) for k in before if k != "shared/step")
    seen = [any(bad), handle.last_step.nonfinite, untouched and before.keys() == after.keys()]
    net.zero_grad()
    problem.train(net, range(4, 6), rank)
    handle.close()
    return [*seen, problem.replicas_equal(net), not handle.last_step.nonfinite]


def test_a_bad_step_of_one_rank_is_given_up_by_all() -> None:
    for bad_rank in (0, 3):
        assert run_ranks(_bad_step, 4, bad_rank) == [[True] * 5] * 4


def _refused_then_raising(rank: int, world_size: int) -> tuple[str, str, float]:
    net = DDP(problem.model())
    try:
        _attached(net, SCHEMES["powersgd"], local_size=3)
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    handle = _attached(net, SCHEMES["powersgd"])
    problem.train(net, range(2), rank)
    if rank == 1:
        handle.reducer.aggregator.aggregator = None  # type: ignore[attr-defined]
    dist.barrier()
    start = time.monotonic()
    try:
        problem.train(net, range(2, 3), rank)
        failure = ""
    except RuntimeError as error:
        failure = str(error)
    return refusal, failure, time.monotonic() - start


def test_what_fails_on_one_rank_is_known_to_all_nodes() -> None:
    for refusal, failure, seconds in run_ranks(_refused_then_raising, 4):
        assert "local_size=3 does not divide the 4 ranks" in refusal
        assert "'NoneType' object has no attribute 'aggregate'" in failure
        assert seconds < 10  # and not the group's timeout of 60


def _run(
    rank: int, block: Any, directory: Path | None, steps: range, save_at: int | None
) -> torch.Tensor:
    """Train ``steps``, from the checkpoint in ``directory`` unless they begin at 0."""
    net = DDP(problem.model(), bucket_cap_mb=0.02)
    handle = _attached(net, block)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    contents: dict[str, Any] = {
        "replicated": {"model": net.module, "optimizer": optimizer},
        "per_rank": {},
        "reducer": handle.reducer,
        "comm": handle.comm,
    }
    if steps.start and directory is not None:
        checkpoint.load(directory, **contents)
    for step in steps:
        optimizer.zero_grad()
        problem.loss_of(net, step, rank).backward()
        optimizer.step()
        if save_at == step + 1 and directory is not None:
            checkpoint.save(directory, **contents)
    handle.close()
    return problem.parameters(net)


def _resumes(rank: int, world_size: int, path: str) -> list[bool]:
    same = []
    for name, block in SCHEMES.items():
        directory = Path(path) / name
        whole = _run(rank, block, directory, range(8), save_at=5)
        same.append(torch.equal(whole, _run(rank, block, directory, range(5, 8), None)))
    return same


def _loads(rank: int, world_size: int, path: str) -> dict[str, dict[str, torch.Tensor]]:
    states = {}
    for name, block in SCHEMES.items():
        net = DDP(problem.model())
        handle = _attached(net, block, local_size=1)
        checkpoint.load(
            Path(path) / name,
            replicated={},
            per_rank={},
            reducer=handle.reducer,
            comm=handle.comm,
        )
        states[name] = handle.state_dict()
        problem.train(net, range(5, 7), rank)
        handle.close()
    return states


def test_a_checkpoint_of_four_ranks_goes_on_with_four_and_with_two(tmp_path: Path) -> None:
    assert run_ranks(_resumes, 4, str(tmp_path), deadline_s=100.0) == [[True, True]] * 4
    first, second = run_ranks(_loads, 2, str(tmp_path))
    for name in SCHEMES:
        assert first[name].keys() == second[name].keys()
        assert all(torch.equal(first[name][key], second[name][key]) for key in first[name])
        saved = [
            checkpoint._read(
                tmp_path / name,
                PlainReader(tmp_path / name).read_metadata(),
                f"reducer/{rank:06d}/",
            )
            for rank in range(4)
        ]
        merged = checkpoint.merge(saved)
        assert merged.keys() == first[name].keys()
        assert all(torch.equal(merged[key], first[name][key]) for key in merged)
        assert any(key.startswith("aggregator/whole/") for key in merged)

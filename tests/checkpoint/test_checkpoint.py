"""Saving and loading: bit for bit at the same world size, mean-preserving at another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import commkit
from commkit import checkpoint
from tests.adapters import problem
from tests.harness import run_ranks

SCHEMES = ["powersgd", "sign", "topk", "randomk", "int4", "int8", "ef21", "econtrol"]


def _run(
    rank: int, scheme: str, directory: Path | None, steps: range, save_at: int | None
) -> torch.Tensor:
    """Train ``steps``, from the checkpoint in ``directory`` unless they begin at 0."""
    net = DDP(problem.model(), bucket_cap_mb=0.02)
    handle = commkit.attach(net, scheme)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    contents = {
        "replicated": {"model": net.module, "optimizer": optimizer},
        "per_rank": {},
        "reducer": handle.reducer,
        "comm": handle.comm,
    }
    if steps.start and directory is not None:
        checkpoint.load(directory, **contents)  # type: ignore[arg-type]
    for step in steps:
        optimizer.zero_grad()
        problem.loss_of(net, step, rank).backward()
        optimizer.step()
        if save_at == step + 1 and directory is not None:
            checkpoint.save(directory, **contents)  # type: ignore[arg-type]
    handle.close()
    return problem.parameters(net)


def resumes(
    rank: int, world_size: int, scheme: str, path: str, steps: int = 12
) -> tuple[bool, bool]:
    directory = Path(path) / "step_6"
    whole = _run(rank, scheme, directory, range(steps), save_at=6)
    # A fresh DDP wrapper starts with other buckets than the one that saved.
    resumed = _run(rank, scheme, directory, range(6, steps), save_at=None)
    return torch.equal(whole, resumed), checkpoint.latest(path) == directory


@pytest.mark.parametrize("scheme", SCHEMES)
def test_resume_is_bit_exact_at_the_same_world_size(scheme: str, tmp_path: Path) -> None:
    assert run_ranks(resumes, 2, scheme, str(tmp_path)) == [(True, True)] * 2


def _left_unsent(handle: commkit.Handle) -> dict[str, torch.Tensor]:
    """Per parameter: mean of the ranks' residuals plus what servers and their heirs hold."""
    state = handle.state_dict()
    left: dict[str, torch.Tensor] = {}
    for name, p in problem.model().named_parameters():
        total = state.get(f"rank/{name}", torch.zeros_like(p).double()).detach().reshape(-1).clone()
        total /= handle.comm.world_size
        for key, value in state.items():
            if key.startswith(f"aggregator/shard/{name}@"):
                start = int(key.rpartition("@")[2])
                total[start : start + value.numel()] += value
            if key == f"aggregator/whole/{name}":
                total += value / handle.comm.world_size
        left[name] = handle.comm.all_reduce(total)
    return left


def save_residuals(rank: int, world_size: int, scheme: str, path: str) -> dict[str, torch.Tensor]:
    net = DDP(problem.model().double(), bucket_cap_mb=0.02)
    handle = commkit.attach(net, scheme)
    problem.train(net, range(5), rank)
    checkpoint.save(path, replicated={}, per_rank={}, reducer=handle.reducer, comm=handle.comm)
    return _left_unsent(handle)


def load_residuals(
    rank: int, world_size: int, scheme: str, path: str
) -> list[dict[str, torch.Tensor]]:
    net = DDP(problem.model().double(), bucket_cap_mb=0.02)
    handle = commkit.attach(net, scheme)
    checkpoint.load(path, replicated={}, per_rank={}, reducer=handle.reducer, comm=handle.comm)
    assert handle.reducer.step == 5
    loaded = _left_unsent(handle)
    # The first step deals servers' state to its new owners; saving again must not count it twice.
    given = {
        n: torch.zeros(p.numel(), dtype=torch.float64) for n, p in net.module.named_parameters()
    }
    taken = {n: t.clone() for n, t in given.items()}
    own = problem.model().double()
    problem.loss_of(own, 0, rank).backward()
    net.module.load_state_dict(own.state_dict())
    problem.loss_of(net, 0, rank).backward()
    for name, p in own.named_parameters():
        assert p.grad is not None
        given[name] = handle.comm.all_reduce(p.grad.reshape(-1) / world_size)
    for name, p in net.module.named_parameters():
        assert p.grad is not None
        taken[name] = p.grad.reshape(-1)
    after = _left_unsent(handle)
    handle.close()
    return [loaded, {n: after[n] + taken[n] - given[n] for n in after}]


@pytest.mark.parametrize("scheme", ["powersgd", "sign", "topk", "econtrol"])
@pytest.mark.parametrize(("before", "after"), [(3, 2), (1, 3)])
def test_another_world_size_conserves_what_was_left_unsent(
    scheme: str, before: int, after: int, tmp_path: Path
) -> None:
    saved = run_ranks(save_residuals, before, scheme, str(tmp_path / "c"))[0]
    for stage in run_ranks(load_residuals, after, scheme, str(tmp_path / "c"))[0]:
        for name, left in saved.items():
            # All in float64, for gradients of about 1.
            torch.testing.assert_close(stage[name], left, rtol=0, atol=1e-13)


def _refuses(rank: int, world_size: int, path: str) -> list[str]:
    net = DDP(problem.model())
    handle = commkit.attach(net, "powersgd")
    messages = []
    for where, on_resize in ((path, "error"), (path + "/nothing", "mean")):
        try:
            checkpoint.load(
                where,
                replicated={},
                per_rank={},
                reducer=handle.reducer,
                comm=handle.comm,
                on_resize=on_resize,  # type: ignore[arg-type]
            )
        except checkpoint.CheckpointError as error:
            messages.append(str(error))
    return messages


def test_a_missing_or_unwanted_checkpoint_is_refused(tmp_path: Path) -> None:
    run_ranks(save_residuals, 1, "powersgd", str(tmp_path / "c"))
    for messages in run_ranks(_refuses, 2, str(tmp_path / "c")):
        assert "saved by 1 ranks and this job has 2" in messages[0]
        assert "no complete checkpoint" in messages[1]


def test_latest_ignores_unfinished_checkpoints(tmp_path: Path) -> None:
    for name, complete in (("step_1", True), ("step_2", True), ("step_3", False)):
        (tmp_path / name).mkdir()
        if complete:
            (tmp_path / name / ".metadata").touch()
    (tmp_path / "step_4.partial").mkdir()
    (tmp_path / "step_4.partial" / ".metadata").touch()
    assert checkpoint.latest(tmp_path) == tmp_path / "step_2"
    assert checkpoint.latest(tmp_path / "none") is None

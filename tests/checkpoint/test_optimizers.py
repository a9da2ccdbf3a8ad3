"""Checkpoints of optimizers that communicate, and residuals through 2 -> 4 -> 2 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import commkit
from commkit import checkpoint
from commkit.optim import CommOptimizer, OptimizerScheme
from commkit.schemes import make_scheme
from tests.adapters import problem
from tests.harness import run_ranks

BLOCKS: dict[str, dict[str, Any]] = {
    "onebit_adam": {"name": "onebit_adam", "freeze_step": 4, "min_numel": 100},
    "onebit_lamb": {"name": "onebit_lamb", "freeze_step": 4, "min_numel": 100},
    "zero_one_adam": {
        "name": "zero_one_adam",
        "var_freeze_step": 3,
        "local_step_scaler": 2,
        "local_step_clipper": 4,
    },
}


class Training:
    """A model, an optimizer that communicates, and what a checkpoint of both holds."""

    def __init__(self, block: dict[str, Any], rank: int, dtype: torch.dtype) -> None:
        scheme = make_scheme(block)
        assert isinstance(scheme, OptimizerScheme)
        self.rank = rank
        self.net = DDP(problem.model().to(dtype), bucket_cap_mb=0.02)
        self.optimizer: CommOptimizer = scheme(self.net.parameters(), lr=1e-2)
        self.handle = commkit.attach(self.net, self.optimizer)

    @property
    def contents(self) -> dict[str, Any]:
        return {
            "replicated": {"model": self.net.module, "optimizer": self.optimizer},
            "per_rank": {},
            "reducer": self.handle.reducer,
            "comm": self.handle.comm,
        }

    def run(self, steps: range) -> None:
        for step in steps:
            self.optimizer.zero_grad()
            problem.loss_of(self.net, step, self.rank).backward()
            self.optimizer.step()


def _resumes(rank: int, world_size: int, name: str, at: int, path: str) -> bool:
    whole = Training(BLOCKS[name], rank, torch.float32)
    whole.run(range(at))
    checkpoint.save(path, **whole.contents)
    whole.run(range(at, 16))
    resumed = Training(BLOCKS[name], rank, torch.float32)
    checkpoint.load(path, **resumed.contents)
    resumed.run(range(at, 16))
    return torch.equal(problem.parameters(whole.net), problem.parameters(resumed.net))


@pytest.mark.parametrize("at", [2, 9])
@pytest.mark.parametrize("name", BLOCKS)
def test_resume_is_bit_exact(name: str, at: int, tmp_path: Path) -> None:
    """In the warm-up, and in the compressed stage: for 0/1 Adam between two synchronisations."""
    assert run_ranks(_resumes, 2, name, at, str(tmp_path / "c")) == [True, True]


def _unsent(training: Training) -> dict[str, torch.Tensor]:
    """Per parameter, flat: mean of the ranks' residuals and other state of their own, and the servers'."""
    state, world_size = training.handle.state_dict(), training.handle.comm.world_size
    left: dict[str, torch.Tensor] = {}
    for key in sorted(state):
        if key.startswith("rank/"):
            left[key] = state[key].double().reshape(-1) / world_size
    for name, p in training.net.module.named_parameters():
        left[f"server/{name}"] = torch.zeros(p.numel(), dtype=torch.float64)
        for key, value in state.items():
            if key.startswith(f"aggregator/shard/{name}@"):
                start = int(key.rpartition("@")[2])
                left[f"server/{name}"][start : start + value.numel()] += value
            if key == f"aggregator/whole/{name}":
                left[f"server/{name}"] += value / world_size
    return {key: training.handle.comm.all_reduce(value) for key, value in left.items()}


def _stage(
    rank: int, world_size: int, name: str, load: str | None, save: str, steps: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], bool]:
    training = Training(BLOCKS[name], rank, torch.float64)
    if load is not None:
        checkpoint.load(load, **training.contents)
    loaded = _unsent(training)
    first = training.handle.reducer.step
    training.run(range(first, first + steps))
    checkpoint.save(save, **training.contents)
    equal = problem.replicas_equal(training.net)
    return loaded, _unsent(training), equal


@pytest.mark.parametrize("name", BLOCKS)
def test_two_four_two_ranks_conserve_what_was_left_unsent(name: str, tmp_path: Path) -> None:
    saved: dict[str, torch.Tensor] | None = None
    load: str | None = None
    for number, world_size in enumerate((2, 4, 2)):
        save = str(tmp_path / f"{number}")
        loaded, left, equal = run_ranks(
            _stage, world_size, name, load, save, 7 if number == 0 else 2
        )[0]
        if saved is not None:
            assert loaded.keys() == saved.keys()
            for key, value in saved.items():
                torch.testing.assert_close(loaded[key], value, rtol=0, atol=1e-12)
        assert equal or name == "zero_one_adam"
        assert any(float(value.abs().max()) > 0 for value in left.values())
        saved, load = left, save

"""What Accelerate's own loop adds: accumulation, and checkpoints of another number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from commkit.checkpoint import CheckpointError, merge
from tests.adapters import problem
from tests.harness import run_ranks

from .launcher import pretend_torchrun
from .setups import SETUPS, Net, adamw, batch

pytest.importorskip("accelerate")
pytestmark = pytest.mark.timeout(180)

TOPK = {"name": "topk", "density": 0.1}


def _prepared(scheme: dict[str, Any], **options: Any) -> tuple[Any, ...]:
    from accelerate import Accelerator

    from commkit.accelerate import SchemeKwargs

    kwargs = SchemeKwargs(scheme=scheme, on_resize=options.pop("on_resize", "mean"))
    accelerator = Accelerator(cpu=True, kwargs_handlers=[kwargs], **options)
    net = Net()
    model, optimizer = accelerator.prepare(net, adamw(net.parameters()))
    return accelerator, model, optimizer, kwargs.attach(accelerator, model, optimizer)


def _train(rank: int, steps: int, prepared: tuple[Any, ...]) -> list[int]:
    """How often gradients were reduced, after each micro-batch."""
    accelerator, model, optimizer, handle = prepared
    reduced = []
    for step in range(steps):
        with accelerator.accumulate(model):
            accelerator.backward(model(*batch(step, rank)))
            optimizer.step()
            optimizer.zero_grad()
        reduced.append(handle.reducer.step)
    return reduced


def _saved(rank: int, world_size: int, directory: str) -> tuple[Any, list[int], Any]:
    pretend_torchrun(rank, world_size)
    accumulated = _prepared(TOPK, gradient_accumulation_steps=2)
    steps = _train(rank, 4, accumulated)
    accumulated[0].save_state(f"{directory}/topk")
    state = {key: x.clone() for key, x in accumulated[3].reducer.state_dict().items()}
    local = _prepared(SETUPS["diloco"].scheme or {})
    _train(rank, 5, local)  # inside a round
    local[0].save_state(f"{directory}/diloco")
    method = local[3]
    with torch.no_grad():  # back to what all replicas have in common
        method.restart_from_anchors()
    weights = problem.parameters(local[1])
    return state, steps, weights


def _resized(rank: int, world_size: int, directory: str) -> tuple[Any, Any, str]:
    pretend_torchrun(rank, world_size)
    accelerator, _, _, handle = _prepared(TOPK)
    accelerator.load_state(f"{directory}/topk")
    state = {key: x.clone() for key, x in handle.reducer.state_dict().items()}
    accelerator, model, _, _ = _prepared(SETUPS["diloco"].scheme or {})
    accelerator.load_state(f"{directory}/diloco")
    weights = problem.parameters(model)
    strict = _prepared(TOPK, on_resize="error")
    with pytest.raises(CheckpointError) as refused:
        strict[0].load_state(f"{directory}/topk")
    return state, weights, str(refused.value)


def test_accumulation_and_another_number_of_ranks(tmp_path: Path) -> None:
    saved = run_ranks(_saved, 2, str(tmp_path), deadline_s=80.0)
    for _, steps, _ in saved:
        assert steps == [0, 1, 1, 2]  # reductions so far: one for two micro-batches
    merged = merge([state for state, _, _ in saved])
    for state, weights, refused in run_ranks(_resized, 3, str(tmp_path), deadline_s=80.0):
        assert state.keys() == merged.keys()
        assert all(torch.equal(state[key], merged[key]) for key in merged)
        assert "saved by 2 ranks and this job has 3" in refused
        assert torch.equal(weights, saved[0][2])  # the last synchronised ones

"""State of all ranks in one object: what comes back, at the same number of ranks and at others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import commkit
from commkit.adapters.frameworks import contents_of
from commkit.adapters.frameworks.gathered import gather, restore
from commkit.checkpoint import CheckpointError, merge
from tests.adapters import problem
from tests.harness import run_ranks

CPU = torch.device("cpu")


def _attached(scheme: str, rank: int) -> tuple[Any, Any]:
    """After three steps of bf16 weights, so that messages of several dtypes travel."""
    net: nn.Module = problem.model().to(torch.bfloat16)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    if scheme != "diloco":
        net = nn.parallel.DistributedDataParallel(net)
    knobs = {"sync_every": 2} if scheme == "diloco" else {}
    handle: Any = commkit.attach(net, scheme, optimizer, **knobs)
    for step in range(3):
        problem.loss_of(net, step, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    return handle, optimizer


def _gathered(rank: int, world_size: int, scheme: str) -> tuple[Any, Any, bool]:
    """What was gathered, this rank's own state, and whether that came back after it was changed."""
    handle, optimizer = _attached(scheme, rank)
    contents = contents_of(handle, optimizer)
    state = {key: x.clone() for key, x in handle.reducer.state_dict().items()}
    weights = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    everything = gather(contents, CPU)
    shared = [everything]
    dist.broadcast_object_list(shared, src=0)  # as all ranks read one file
    for p in optimizer.param_groups[0]["params"]:
        if scheme == "diloco":
            p.data.add_(1)
    handle.reducer.load_state_dict(
        {k: x if k.startswith("shared/") else torch.zeros_like(x) for k, x in state.items()}
    )
    restore(contents, shared[0], "error")
    back = handle.reducer.state_dict()
    same = state.keys() == back.keys() and all(torch.equal(state[k], back[k]) for k in state)
    same = same and all(
        torch.equal(w, p) for w, p in zip(weights, optimizer.param_groups[0]["params"], strict=True)
    )
    handle.close()
    return everything, state, same


def _resized(rank: int, world_size: int, everything: Any) -> tuple[dict[str, torch.Tensor], str]:
    handle, optimizer = _attached("topk", rank)
    contents = contents_of(handle, optimizer)
    with pytest.raises(CheckpointError) as refused:
        restore(contents, everything, "error")
    restore(contents, everything, "mean")
    state = {key: x.clone() for key, x in handle.reducer.state_dict().items()}
    handle.close()
    return state, str(refused.value)


@pytest.mark.parametrize("scheme", ["sign", "topk", "diloco"])
def test_what_was_gathered_is_every_ranks_own(scheme: str) -> None:
    told = run_ranks(_gathered, 2, scheme)
    assert all(same for _, _, same in told)
    everything = told[0][0]
    for rank, (_, state, _) in enumerate(told):
        own = everything["ranks"][rank]["reducer"]
        assert own.keys() == state.keys()
        assert all(torch.equal(own[key], state[key]) for key in own)


def test_another_number_of_ranks_starts_from_the_mean() -> None:
    saved = run_ranks(_gathered, 2, "topk")
    expected = merge([state for _, state, _ in saved])
    for state, refused in run_ranks(_resized, 3, saved[0][0]):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)
        assert "saved by 2 ranks and this job has 3" in refused

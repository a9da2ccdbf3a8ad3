"""Held parameters: unused on this rank, so they contribute zeros and their residual waits."""

from __future__ import annotations

import pytest
import torch

from commkit.policy import Policy
from commkit.reducer import Reducer
from commkit.schemes import make_reducer
from commkit.sim import ThreadComm

from .inputs import on_ranks, residual, sample

BLOCKS = [
    {"name": "topk", "density": 0.1, "min_numel": 0},
    {"name": "randomk", "density": 0.1, "min_numel": 0},
    {"name": "powersgd", "rank": 1, "min_compression_rate": 0.0},
    {"name": "sign", "min_numel": 0},
    {"name": "int4", "min_numel": 0},
]
every_scheme = pytest.mark.parametrize("block", BLOCKS, ids=[str(b["name"]) for b in BLOCKS])


def grads(rank: int, step: int) -> dict[str, torch.Tensor]:
    return {key: sample((20, 30), 100 * step + 10 * rank + i) for i, key in enumerate("ab")}


@every_scheme
def test_a_held_key_keeps_its_residual(block) -> None:
    def body(reducer: Reducer, comm: ThreadComm) -> None:
        reducer.reduce(grads(comm.rank, 0), comm)
        reducer.end_step()
        before = {key: residual(reducer, key) for key in "ab"}
        named = grads(comm.rank, 1)
        held = {"a"} if comm.rank == 0 else set()
        if held:
            named["a"].zero_()
        reducer.reduce(named, comm, hold=held)
        reducer.end_step()
        for key in "ab":
            same = torch.equal(residual(reducer, key), before[key])
            assert same == (key in held), (comm.rank, key)

    on_ranks(2, lambda: make_reducer(block), body)


@every_scheme
def test_a_key_held_by_all_gives_zeros(block) -> None:
    def body(reducer: Reducer, comm: ThreadComm) -> torch.Tensor:
        reducer.reduce(grads(comm.rank, 0), comm)
        reducer.end_step()
        before = reducer.state_dict()
        named = {"a": torch.zeros(20, 30)}
        out = reducer.reduce(named, comm, hold={"a"})["a"]
        reducer.end_step()
        after = reducer.state_dict()
        assert before.keys() == after.keys()
        for key in before:
            assert key == "shared/step" or torch.equal(before[key], after[key]), key
        return out

    assert not any(out.any() for out in on_ranks(2, lambda: make_reducer(block), body))


@every_scheme
def test_others_get_through_to_a_rank_that_holds(block) -> None:
    """Over steps in which rank 0 holds, the mean still gets half of rank 1's gradient."""
    steps = 5

    def body(reducer: Reducer, comm: ThreadComm):
        total, inputs = torch.zeros(20, 30), torch.zeros(20, 30)
        for step in range(steps):
            x = torch.zeros(20, 30) if comm.rank == 0 else grads(1, step)["a"]
            inputs += x
            total += reducer.reduce({"a": x}, comm, hold={"a"} if comm.rank == 0 else ())["a"]
            reducer.end_step()
        state = reducer.state_dict()
        assert ("rank/a" in state) == (comm.rank == 1)
        kept = state.get("rank/a", torch.zeros(20, 30)) / 2
        for key, value in state.items():
            if "/shard/" in key:
                start = int(key.partition("@")[2])
                kept.view(-1)[start : start + value.numel()] += value
        return total, inputs, kept

    (total, _, kept), (other, inputs, own) = on_ranks(2, lambda: make_reducer(block), body)
    assert torch.equal(total, other)
    # five float32 additions of numbers below 20
    torch.testing.assert_close(total + kept + own, inputs / 2, rtol=1e-5, atol=1e-5)


@every_scheme
def test_a_held_key_that_went_dense_keeps_its_residual_too(block) -> None:
    """Its result may be thrown away, so the residual must not be sent with it."""

    def body(reducer: Reducer, comm: ThreadComm) -> None:
        reducer.reduce(grads(comm.rank, 0), comm)
        reducer.end_step()
        before = residual(reducer, "a")
        reducer.policy = Policy(start_step=1000)
        out = reducer.reduce({"a": torch.zeros(20, 30)}, comm, hold={"a"})["a"]
        reducer.end_step()
        assert torch.equal(residual(reducer, "a"), before)
        assert not out.any()

    on_ranks(2, lambda: make_reducer(block), body)

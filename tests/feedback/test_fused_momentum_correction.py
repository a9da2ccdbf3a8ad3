"""Momentum correction and top-k in one pass give the bits of the two one after the other."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch

from commkit.aggregators import AllGather, Hierarchical
from commkit.compressors import TopK
from commkit.feedback import MomentumCorrection
from commkit.policy import Policy
from commkit.reducer import Reducer
from commkit.sim import ThreadComm, run_threads

SHAPE = (70, 30)
STEPS = 5


class InParts(TopK):
    """TopK whose fused path is never taken."""

    def corrects(self, ctx: Any) -> bool:
        return False


def gradient(rank: int, step: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randn(SHAPE, generator=generator).to(dtype)
    if step == 2:
        x *= 1e-6  # below what float16 can say
    if step == 3 and rank == 0:
        x[1, 2] = torch.inf
    return x


def history(
    compressor: TopK,
    feedback: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    world_size: int = 2,
    local_size: int = 0,
) -> list[list[dict[str, torch.Tensor]]]:
    """Per rank and step: the result and all state."""

    def body(comm: ThreadComm) -> list[dict[str, torch.Tensor]]:
        aggregator: Any = AllGather(compressor)
        correction: Any = MomentumCorrection(**feedback)
        if local_size:
            aggregator, correction = Hierarchical(aggregator, correction, local_size), None
        reducer, seen = Reducer(aggregator, correction, Policy(min_numel=0)), []
        for step in range(STEPS):
            gradients = {"w": gradient(comm.rank, step, dtype), "b": torch.ones(7, dtype=dtype)}
            results = {k: x.clone() for k, x in reducer.reduce(gradients, comm).items()}
            reducer.end_step()
            assert reducer.skipped == (step == 3)
            seen.append(results | {k: x.clone() for k, x in reducer.state_dict().items()})
        return seen

    return run_threads(body, world_size)


def assert_same(got: Any, wanted: Any) -> None:
    for ours, theirs in zip(chain(*got), chain(*wanted), strict=True):
        assert ours.keys() == theirs.keys()
        for key, x in ours.items():
            assert x.dtype == theirs[key].dtype
            assert torch.equal(
                *(y.contiguous().view(-1).view(torch.uint8) for y in (x, theirs[key]))
            )


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parameters that took the fused path, one entry for each time."""
    taken: list[str] = []
    path = TopK.correct_and_compress

    def record(self: TopK, *arguments: Any) -> Any:
        taken.append(arguments[-1].key)
        return path(self, *arguments)

    monkeypatch.setattr(TopK, "correct_and_compress", record)
    return taken


@pytest.mark.parametrize("values", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_same_bits_in_every_precision(dtype: torch.dtype, values: Any, fused: list[str]) -> None:
    settings = {"density": 0.02, "threshold": "sampled", "values": values}
    if dtype == torch.bfloat16:
        settings["warmup_steps"] = 4
    got = history(TopK(**settings), {}, dtype)
    assert len(fused) == 2 * 2 * STEPS  # ranks and tensors
    assert_same(got, history(InParts(**settings), {}, dtype))
    assert len(fused) == 2 * 2 * STEPS


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize("world_size", [1, 3])
def test_same_bits_of_every_rule(
    world_size: int, masking: bool, nesterov: bool, fused: list[str]
) -> None:
    feedback = {"momentum": 0.7, "masking": masking, "nesterov": nesterov}
    got = history(TopK(0.1, "sampled"), feedback, world_size=world_size)
    assert fused
    assert_same(got, history(InParts(0.1, "sampled"), feedback, world_size=world_size))


@pytest.mark.parametrize("local_size", [1, 2, 4])
def test_same_bits_between_nodes(local_size: int, fused: list[str]) -> None:
    got = history(TopK(0.1, "sampled"), {}, world_size=4, local_size=local_size)
    assert bool(fused) == (local_size < 4)  # one node alone sends nothing
    assert_same(got, history(InParts(0.1, "sampled"), {}, world_size=4, local_size=local_size))


def test_small_tensors_and_exact_thresholds_go_in_parts(fused: list[str]) -> None:
    history(TopK(0.1, "auto"), {})
    history(TopK(0.1, "exact"), {})
    assert not fused


def test_a_velocity_from_dense_steps_is_where_it_starts() -> None:
    results = []
    for compressor in (TopK(0.1, "sampled"), InParts(0.1, "sampled")):
        feedback = MomentumCorrection()
        buffer = torch.arange(2100.0).view(SHAPE)
        feedback.initial_velocity = {"w": buffer}.get
        reducer = Reducer(AllGather(compressor), feedback, Policy(min_numel=0))
        [out] = run_threads(
            lambda comm, at_work=reducer: at_work.reduce({"w": torch.ones(SHAPE)}, comm), 1
        )
        reducer.end_step()
        assert torch.equal(buffer, torch.arange(2100.0).view(SHAPE))
        results.append([[out | reducer.state_dict()]])
    assert_same(*results)

"""The laws of every scheme that can be read off a run of ten steps in float64."""

from __future__ import annotations

import pytest
import torch

from commkit import registry
from commkit.aggregators import Hierarchical, TwoShot
from tests.named_schemes import REDUCERS

from .scheme_cases import (
    AVERAGING,
    BLOCKS,
    CONSERVING,
    SHAPES,
    UNLAWFUL,
    WITH_FEEDBACK,
    build,
    mean_residual,
    traces,
)

every_scheme = pytest.mark.parametrize("case", BLOCKS)
with_feedback = pytest.mark.parametrize("case", WITH_FEEDBACK)
conserving = pytest.mark.parametrize("case", CONSERVING)
every_world = pytest.mark.parametrize("world_size", [1, 2, 3])

# Float64 arithmetic on numbers of size 1 to 100: what is left is rounding.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def total(steps: list[dict[str, torch.Tensor]], key: str) -> torch.Tensor:
    return torch.stack([step[key] for step in steps]).sum(0)


def test_every_registered_scheme_has_a_case() -> None:
    assert {block["name"] for block in BLOCKS.values()} >= set(REDUCERS) - {"noop"}
    assert set(UNLAWFUL) <= set(registry.names("scheme"))


@every_world
@every_scheme
def test_results_have_the_shape_and_dtype_of_gradients(case: str, world_size: int) -> None:
    for trace in traces(case, world_size):
        for grads, outs in zip(trace.grads, trace.outs, strict=True):
            assert outs.keys() == grads.keys()
            for key, out in outs.items():
                assert out.shape == grads[key].shape
                assert out.dtype == grads[key].dtype
                assert bool(out.isfinite().all())


@every_world
@every_scheme
def test_all_ranks_hold_the_same_bits(case: str, world_size: int) -> None:
    first, *others = traces(case, world_size)
    for other in others:
        for step, outs in enumerate(first.outs):
            for key, out in outs.items():
                assert torch.equal(out, other.outs[step][key]), (step, key)


@every_world
@conserving
def test_a_rank_sends_or_keeps_everything(case: str, world_size: int) -> None:
    """Sum of sent + residual == sum of inputs."""
    for trace in traces(case, world_size):
        for key in SHAPES:
            kept = total(trace.sent, key) + trace.residual(key)
            torch.testing.assert_close(kept, total(trace.grads, key), **EXACT)


@every_world
@conserving
def test_the_mean_gradient_arrives_or_is_kept(case: str, world_size: int) -> None:
    """Sum of results + mean residual + server residuals == sum of mean gradients."""
    ranks = traces(case, world_size)
    for key, shape in SHAPES.items():
        arrived = total(ranks[0].outs, key) + mean_residual(ranks, key, torch.Size(shape))
        expected = sum(total(trace.grads, key) for trace in ranks) / world_size
        torch.testing.assert_close(arrived, expected, **EXACT)


@every_world
@pytest.mark.parametrize(
    "case", [c for c in AVERAGING if not isinstance(build(c).aggregator, TwoShot | Hierarchical)]
)
def test_one_stage_results_are_the_mean_of_what_was_sent(case: str, world_size: int) -> None:
    ranks = traces(case, world_size)
    half = BLOCKS[case]["name"] in ("bf16", "fp16")
    # 16-bit all-reduces add up in 16 bits: 3 roundings of sums of at most the sum of magnitudes
    eps = {"bf16": 2**-8, "fp16": 2**-11}.get(BLOCKS[case]["name"], 0.0)
    for step, outs in enumerate(ranks[0].outs):
        for key, out in outs.items():
            sent = torch.stack([trace.sent[step][key] for trace in ranks])
            slack = 3 * eps * sent.abs().mean(0) if half else 1e-12
            assert bool(((out - sent.mean(0)).abs() <= slack).all()), (step, key)


@every_world
@every_scheme
def test_every_step_is_counted(case: str, world_size: int) -> None:
    for trace in traces(case, world_size):
        dense = sum(torch.Size(shape).numel() for shape in SHAPES.values()) * 8
        for step, stats in enumerate(trace.stats):
            assert stats.step == step
            assert stats.num_contributors == world_size
            assert stats.dense_bytes == dense
            assert not stats.nonfinite
        assert int(trace.state["shared/step"]) == len(trace.stats)


@with_feedback
def test_something_is_kept(case: str) -> None:
    """The runs above would prove nothing about a scheme that compresses nothing."""
    state = traces(case, 2)[0].state
    assert any(name.startswith("rank/") and value.any() for name, value in state.items())


@every_world
@every_scheme
def test_only_compressed_tensors_have_state(case: str, world_size: int) -> None:
    for trace in traces(case, world_size):
        for name, value in trace.state.items():
            key = name.rsplit("/", 1)[-1].partition("@")[0].rpartition("::")[2]
            assert key in {*SHAPES, "step"}
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), name

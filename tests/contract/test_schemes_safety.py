"""What every scheme does with gradients that are not numbers, zero, tiny, huge, equal or opposite."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from commkit.aggregators import TernGrad, TwoShot
from commkit.reducer import Reducer
from commkit.sim import ThreadComm, run_threads

from .scheme_cases import (
    BLOCKS,
    CONSERVING,
    SHAPES,
    VOTES,
    WITH_FEEDBACK,
    Tensors,
    between_nodes,
    build,
    copied,
    gradients,
    mean_residual,
    run,
)

every_scheme = pytest.mark.parametrize("case", BLOCKS)
with_feedback = pytest.mark.parametrize("case", WITH_FEEDBACK)


def state_of(reducer: Reducer) -> Tensors:
    """A copy of all state but the step."""
    state = copied(reducer.state_dict())
    del state["shared/step"]
    return state


def unchanged(before: Tensors, after: Tensors) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def dense_mean(world_size: int, step: int, spoil: Callable[[int, Tensors], None]) -> Tensors:
    """What a plain all-reduce gives: divided first, added up in rank order."""
    ranks = [gradients(rank, step) for rank in range(world_size)]
    for rank, grads in enumerate(ranks):
        spoil(rank, grads)
    return {key: sum(grads[key] / world_size for grads in ranks) for key in SHAPES}


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
@pytest.mark.parametrize("world_size", [1, 3])
@every_scheme
def test_a_bad_step_is_dense_and_leaves_no_trace(case: str, world_size: int, bad: float) -> None:
    def spoil(rank: int, grads: Tensors) -> None:
        if rank == world_size - 1:
            grads["matrix"][5, 7] = bad

    def body(comm: ThreadComm) -> None:
        reducer = build(case)
        for step in range(2):
            reducer.reduce(gradients(comm.rank, step), comm)
            reducer.end_step()
        before = state_of(reducer)
        grads = gradients(comm.rank, 2)
        spoil(comm.rank, grads)
        outs = copied(reducer.reduce(grads, comm))
        stats = reducer.end_step()
        for key, expected in dense_mean(world_size, 2, spoil).items():
            assert torch.equal(outs[key].nan_to_num(9.0), expected.nan_to_num(9.0)), key
        assert not outs["matrix"][5, 7].isfinite()
        assert stats.nonfinite or not before
        assert unchanged(before, state_of(reducer))
        after = reducer.reduce(gradients(comm.rank, 3), comm)
        assert not reducer.end_step().nonfinite
        assert all(bool(out.isfinite().all()) for out in after.values())

    run_threads(body, world_size)


@with_feedback
def test_a_bad_tensor_that_is_not_compressed_freezes_the_step_too(case: str) -> None:
    """A scaler will skip the whole step, so the whole step's state must wait."""

    def body(comm: ThreadComm) -> None:
        reducer = build(case)
        for step in range(2):
            reducer.reduce(gradients(comm.rank, step), comm)
            reducer.end_step()
        before = state_of(reducer)
        grads = gradients(comm.rank, 2)
        good = {"matrix": grads["matrix"]}
        bad = {"vector": grads["vector"], "scalar": grads["scalar"] + comm.rank * torch.nan}
        reducer.reduce(good, comm)
        outs = reducer.reduce(bad, comm)
        assert reducer.end_step().nonfinite
        assert not outs["scalar"].isfinite()
        assert unchanged(before, state_of(reducer))

    run_threads(body, 2)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", [case for case in BLOCKS if case not in VOTES])
def test_zero_gradients(case: str, world_size: int) -> None:
    """Zeros at first, zeros later: never a NaN, and other steps are as good as before."""

    def grads(rank: int, step: int) -> Tensors:
        own = gradients(rank, step)
        return own if step in (2, 4) else {key: torch.zeros_like(x) for key, x in own.items()}

    for trace in run(lambda: build(case), world_size, 6, grads):
        assert not any(out.any() for outs in trace.outs[:2] for out in outs.values())
        assert all(bool(x.isfinite().all()) for outs in trace.outs for x in outs.values())
        assert all(bool(x.isfinite().all()) for x in trace.state.values())
        assert trace.outs[2]["matrix"].any()
        assert not any(stats.nonfinite for stats in trace.stats)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("case", VOTES)
def test_votes_on_zeros_are_coins(case: str, world_size: int) -> None:
    """They have no third value; always +1 would make parameters drift."""

    def grads(rank: int, step: int) -> Tensors:
        return {key: torch.zeros_like(x) for key, x in gradients(rank, step).items()}

    for trace in run(lambda: build(case), world_size, 4, grads):
        tossed = torch.stack([outs["matrix"] for outs in trace.outs])
        assert bool((tossed.abs() == 1).all())
        # 5 standard deviations of the mean of fair coins
        assert tossed.mean().abs() < 5 / tossed.numel() ** 0.5
        assert not torch.equal(tossed[0], tossed[1])


def opposite(rank: int, step: int) -> Tensors:
    return {key: x.double() * (1 - 2 * rank) for key, x in gradients(0, step).items()}


@every_scheme
def test_opposite_gradients(case: str) -> None:
    """The mean is zero: nothing but what compression adds may come out, and that is kept in mind."""
    ranks = run(lambda: build(case), 2, 6, opposite)
    for key, shape in SHAPES.items():
        arrived = torch.stack([outs[key] for outs in ranks[0].outs])
        assert bool(arrived.isfinite().all())
        if case in CONSERVING:
            left = arrived.sum(0) + mean_residual(ranks, key, torch.Size(shape))
            assert float(left.abs().max() if left.numel() else 0) < 1e-11, key


@pytest.mark.parametrize(
    "case", [case for case in BLOCKS if not isinstance(between_nodes(case), TwoShot | TernGrad)]
)
def test_equal_gradients_need_no_averaging(case: str) -> None:
    """Two equal ranks get what one alone would. (Two-shot cuts tensors into as many shards as there are
    ranks, each with its own scale; TernGrad's ranks round independently.)"""

    def grads(rank: int, step: int) -> Tensors:
        return gradients(0, step, torch.float64)

    alone, pair = (run(lambda: build(case), world_size, 4, grads)[0] for world_size in (1, 2))
    for key in SHAPES:
        for first, second in zip(alone.outs, pair.outs, strict=True):
            torch.testing.assert_close(first[key], second[key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("exponent", [-100, 100])
@pytest.mark.parametrize("case", [case for case in BLOCKS if BLOCKS[case]["name"] != "fp16"])
def test_results_scale_with_the_gradients(case: str, exponent: int) -> None:
    """No absolute threshold: 2^-100 and 2^100 are about 1e-30 and 1e30."""

    def scaled(factor: float) -> Callable[[int, int], Tensors]:
        return lambda r, s: {key: x * factor for key, x in gradients(r, s).items()}

    plain, changed = (
        run(lambda: build(case), 2, 3, scaled(factor))[0] for factor in (1.0, 2.0**exponent)
    )
    assert not any(stats.nonfinite for stats in changed.stats)
    for first, second in zip(plain.outs, changed.outs, strict=True):
        for key in SHAPES:
            # powers of two are exact; sums and factorisations may round differently
            torch.testing.assert_close(
                second[key] * (1 if case in VOTES else 2.0**-exponent),
                first[key],
                rtol=1e-4,
                atol=1e-5,
            )


def test_fp16_sends_what_overflows_densely() -> None:
    def grads(rank: int, step: int) -> Tensors:
        return {key: x * 1e30 for key, x in gradients(rank, step).items()}

    trace = run(lambda: build("fp16"), 2, 1, grads)[0]
    expected = dense_mean(2, 0, lambda rank, own: None)
    for key in SHAPES:
        torch.testing.assert_close(trace.outs[0][key], expected[key] * 1e30, rtol=1e-5, atol=1e24)


@pytest.mark.parametrize("size", [1e-30, 1e30])
@every_scheme
def test_extreme_gradients_stay_finite(case: str, size: float) -> None:
    def grads(rank: int, step: int) -> Tensors:
        return {key: x * size for key, x in gradients(rank, step).items()}

    for trace in run(lambda: build(case), 2, 3, grads):
        assert all(bool(x.isfinite().all()) for outs in trace.outs for x in outs.values())
        assert all(bool(x.isfinite().all()) for x in trace.state.values())


@every_scheme
def test_the_mean_of_finite_gradients_is_finite(case: str) -> None:
    """Near the end of float32 the mean exists where the sum does not; a plain all-reduce finds it."""

    def grads(rank: int, step: int) -> Tensors:
        return {key: torch.sign(x) * 3e38 for key, x in gradients(rank, step).items()}

    for trace in run(lambda: build(case), 2, 1, grads):
        assert all(bool(out.isfinite().all()) for out in trace.outs[0].values())
        assert all(bool(x.isfinite().all()) for x in trace.state.values())

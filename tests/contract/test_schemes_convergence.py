"""Schemes over many steps: neutral settings, training a quadratic, and residuals that stay bounded."""

from __future__ import annotations

import math

import pytest
import torch

from commkit.schemes import make_reducer
from commkit.sim import ThreadComm, run_threads

from .scheme_cases import BLOCKS, CONSERVING, SHAPES, VOTES, build, gradients, run

NEUTRAL = {
    "topk of all": {"name": "topk", "density": 1.0, "min_numel": 0},
    "randomk of all": {"name": "randomk", "density": 1.0, "min_numel": 0},
    "powersgd of full rank": {"name": "powersgd", "rank": 64, "min_compression_rate": 0.0},
}
LATE = {
    name: {"name": name, "start_step": 3}
    for name in (
        "int8",
        "int4",
        "sign",
        "topk",
        "randomk",
        "dynamic8",
        "qsgd",
        "natural",
        "terngrad",
    )
}


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("block", NEUTRAL.values(), ids=list(NEUTRAL))
def test_neutral_settings_are_an_all_reduce(block, world_size: int) -> None:
    plain, neutral = (
        run(lambda b=b: make_reducer(b), world_size, 4, gradients)[0]
        for b in ({"name": "ddp"}, block)
    )
    for expected, outs in zip(plain.outs, neutral.outs, strict=True):
        for key in SHAPES:
            # float32 sums and products of a 64-column factorisation, values below 10
            torch.testing.assert_close(outs[key], expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [*LATE.values(), {"name": "powersgd", "start_step": 3}], ids=str)
def test_before_start_step_it_is_an_all_reduce(block) -> None:
    plain, late = (
        run(lambda b=b: make_reducer(b), 2, 4, gradients)[0] for b in ({"name": "ddp"}, block)
    )
    for step in range(3):
        for key in SHAPES:
            assert torch.equal(late.outs[step][key], plain.outs[step][key])
    assert not torch.equal(late.outs[3]["matrix"], plain.outs[3]["matrix"])


def lasting() -> list[str]:
    """Cases worth many steps: a bare name only where no setting of it is listed."""
    listed = {block["name"] for case, block in BLOCKS.items() if case != block["name"]}
    return [case for case in CONSERVING if case not in listed]


@pytest.mark.parametrize("case", lasting())
def test_gradient_descent_reaches_the_optimum_of_a_quadratic(case: str) -> None:
    """f_r(x) = |x - b_r|^2 / 2 on each of two ranks: the optimum is the mean of b, where no rank's own
    gradient is zero."""
    shape, steps = (32, 36), 300
    targets = [gradients(rank, 0)["vector"][:1152].view(shape) for rank in range(2)]
    optimum = torch.stack(targets).mean(0)

    def body(comm: ThreadComm) -> float:
        x, reducer = torch.zeros(shape), build(case)
        for step in range(steps):
            grad = reducer.reduce({"weight": x - targets[comm.rank]}, comm)["weight"]
            reducer.end_step()
            # At density 0.1 an element waits ten steps: lr * 10 < 1. What is unsent at the end is worth
            # lr * |e|, so lr goes to zero.
            x = x - 0.03 * (1 + math.cos(math.pi * step / steps)) * grad
        return float((x - optimum).norm() / optimum.norm())

    # 1 at the start, e^-9 for exact descent
    assert max(run_threads(body, 2)) < 0.05


@pytest.mark.parametrize("case", VOTES)
def test_votes_descend_to_within_a_step_of_the_median(case: str) -> None:
    """The sign of sums is the gradient of sum |x - b_r|: three ranks meet at the median of b."""
    targets = torch.stack([gradients(rank, 0)["vector"] for rank in range(3)])
    lr, steps = 0.02, 400

    def body(comm: ThreadComm) -> torch.Tensor:
        x, reducer = torch.zeros(2000), build(case)
        for _ in range(steps):
            x = x - lr * reducer.reduce({"weight": x - targets[comm.rank]}, comm)["weight"]
            reducer.end_step()
        return x

    median = targets.median(0).values
    near = median.abs() < lr * steps / 2
    for x in run_threads(body, 3):
        error = (x - median)[near].abs()
        # Momentum lags by beta / (1 - beta) steps on average, each of size lr: farther from the median than
        # that its sign is right. 1 % is float32 rounding of 400 steps.
        beta = getattr(build(case).feedback, "beta", 0.0)
        assert float(error.max()) <= 1.01 * lr * (1 + beta / (1 - beta))


def one_of_each() -> list[str]:
    """One case for each pair of aggregator and compressor, and each kind of iteration."""
    pairs = {}
    for case in lasting():
        aggregator = build(case).aggregator
        iteration = getattr(aggregator, "iteration", None)
        pairs[type(aggregator), type(getattr(aggregator, "compressor", None)), iteration] = case
    return list(pairs.values())


@pytest.mark.parametrize("case", one_of_each())
def test_residuals_stay_bounded_over_noise(case: str) -> None:
    """1000 steps of independent noise: a residual that keeps the ranks' disagreement grows like sqrt(t),
    2.6 times between the two windows."""
    generators = [torch.Generator().manual_seed(rank) for rank in range(2)]

    def body(comm: ThreadComm) -> tuple[float, float]:
        reducer, norms = build(case), []
        for noise in torch.randn(1000, 24, 44, generator=generators[comm.rank]):
            reducer.reduce({"weight": noise}, comm)
            reducer.end_step()
            if reducer.step % 20 == 0:
                served = [v for k, v in reducer.state_dict().items() if "/shard/" in k]
                norms.append(math.hypot(reducer.feedback.norm(), *map(torch.norm, served)))
        return max(norms[5:10]), max(norms[45:])

    for early, late in run_threads(body, 2):
        assert late < 1.3 * early

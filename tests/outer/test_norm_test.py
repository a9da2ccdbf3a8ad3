"""What batch the gradients of several workers call for, and how a worker makes it."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from commkit.outer.norm_test import (
    BatchPlan,
    BatchTest,
    InnerProductTest,
    NormTest,
    largest_micro_batch,
    plan_batch,
)
from tests.harness import ThreadComm, run_ranks, run_threads


def requests(test: BatchTest, gradients: Any, samples: int) -> list[int | None]:
    """Of each rank; ``gradients`` are rows."""
    rows = torch.as_tensor(gradients, dtype=torch.float32)

    def run(comm: ThreadComm) -> int | None:
        mine = rows[comm.rank]
        before = mine.clone()
        asked = test.request([mine[:1], mine[1:].view(-1, 1)], samples, comm)
        assert torch.equal(mine, before) or not torch.isfinite(before).all()
        return asked

    return run_threads(run, len(rows))


def test_hand_case() -> None:
    """M=2, b=4, g=(1,0), (0,1), eta=0.5: V=4, 16 samples."""
    assert requests(NormTest(0.5), [[1.0, 0.0], [0.0, 1.0]], 4) == [16, 16]


def test_corrected_norm() -> None:
    """The same: |g|^2 = 0.5 holds V/(M b) = 0.5 of noise, of which 99 percent are taken off."""
    assert requests(NormTest(0.5, corrected=True), [[1.0, 0.0], [0.0, 1.0]], 4) == [1600] * 2
    rows = [[2.0, 1.0], [2.0, 0.0]]  # mean (2, .5), |g|^2 4.25, sum of squares .5, V=2, bias .25
    assert requests(NormTest(0.5, corrected=True), rows, 4) == [1, 1]
    assert requests(NormTest(0.1, corrected=True), rows, 4) == [25, 25]  # 2 / (2 0.01 4.0)


def test_inner_product_hand_case() -> None:
    """g=(2,1), (2,-1), (5,0), mean (3,0), b=4. Inner products 6, 6, 15: variance 4/2 (9+9+36) = 108.
    Across the mean 1, -1, 0: variance 4/2 (1+1) = 4."""
    rows = [[2.0, 1.0], [2.0, -1.0], [5.0, 0.0]]
    along = 108 / (0.1**2 * 81) / 3
    across = 4 / (0.1**2 * 9) / 3
    assert requests(InnerProductTest(theta=0.1, nu=1e6), rows, 4) == [int(np.ceil(along))] * 3
    assert requests(InnerProductTest(theta=1e6, nu=0.1), rows, 4) == [int(np.ceil(across))] * 3


@pytest.mark.parametrize("test", [NormTest(0.5), InnerProductTest(0.2, 0.5)])
def test_requests_do_not_depend_on_the_scale_of_gradients(test: BatchTest) -> None:
    rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)) + 0.5
    asked = requests(test, rows, 16)
    for scale in (2.0**-40, 2.0**20):
        assert requests(test, rows * scale, 16) == asked


@pytest.mark.parametrize("test", [NormTest(0.5), InnerProductTest(0.3, 0.3)])
def test_the_request_estimates_the_noise_and_not_the_batch(test: BatchTest) -> None:
    """Gradients of b samples have 1/b of the variance: the estimate must be the same for all b."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.full((400,), 1.0)
    asked = []
    for samples in (4, 64):
        noise = 3.0 * torch.randn(8, 400, generator=generator) / samples**0.5
        asked.append(requests(test, truth + noise, samples)[0])
    assert None not in asked
    assert asked[0] == pytest.approx(asked[1], rel=0.35)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_skips_the_test_everywhere(bad: float) -> None:
    assert requests(NormTest(), [[1.0, 0.0], [0.0, 1.0], [bad, 1.0]], 4) == [None] * 3


def test_one_worker_and_vanishing_means_say_nothing() -> None:
    assert requests(NormTest(), [[1.0, 0.0]], 4) == [None]
    assert requests(NormTest(), [[1.0, 0.0], [-1.0, 0.0]], 4) == [None, None]
    assert requests(NormTest(), [[0.0, 0.0], [0.0, 0.0]], 4) == [None, None]
    assert requests(NormTest(), [[1.0, 1.0], [1.0, 1.0]], 4) == [1, 1]  # no noise at all


def test_communication_is_one_gradient_and_scalars() -> None:
    def run(comm: ThreadComm) -> int:
        NormTest().request([torch.full((1000,), 1.0 + comm.rank)], 4, comm)
        return comm.bytes.payload_bytes

    assert run_threads(run, 2) == [4000 + 24 + 8] * 2


def _processes(rank: int, world_size: int) -> int | None:
    from torch import distributed as dist

    from commkit.comm import DistComm

    gradient = torch.randn(50, generator=torch.Generator().manual_seed(rank)) + 0.3
    assert dist.group.WORLD is not None
    return NormTest(0.2).request([gradient], 8, DistComm(dist.group.WORLD))


def test_processes_agree_and_are_right() -> None:
    rows = torch.stack(
        [torch.randn(50, generator=torch.Generator().manual_seed(r)) + 0.3 for r in range(3)]
    ).double()
    mean = rows.mean(0)
    variance = 8 / 2 * (rows - mean).square().sum()
    expected = float(variance / (3 * 0.04 * mean.square().sum()))
    asked = run_ranks(_processes, 3)
    assert asked == [asked[0]] * 3
    assert asked[0] == pytest.approx(expected, abs=1.01)


@pytest.mark.parametrize(
    ("requested", "plan"),
    [
        (5, BatchPlan(5)),
        (32, BatchPlan(32)),
        (33, BatchPlan(32)),
        (64, BatchPlan(32)),
        (65, BatchPlan(32, 3)),
        (96, BatchPlan(32, 3)),
        (97, BatchPlan(32, 4)),
    ],
)
def test_switch_mode(requested: int, plan: BatchPlan) -> None:
    assert plan_batch(requested, 32) == plan


@pytest.mark.parametrize("switch_at", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("max_batch", [None, 100, 31, 1000])
def test_plans_fit_and_grow(switch_at: float, max_batch: int | None) -> None:
    samples = 0
    for requested in range(1, 300):
        plan = plan_batch(min(requested, max_batch or requested), 32, switch_at, max_batch)
        assert plan.micro_batch <= 32
        assert plan.samples >= samples
        samples = plan.samples
        assert samples <= (max_batch or requested + 31)


def test_always_accumulating() -> None:
    assert plan_batch(33, 32, switch_at=1.0) == BatchPlan(32, 2)


@pytest.mark.parametrize("true_limit", [1, 2, 3, 63, 64, 65, 500])
def test_bisection_finds_the_largest(true_limit: int) -> None:
    tried = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= true_limit

    assert largest_micro_batch(fits, 200, keep=1.0) == min(true_limit, 200)
    assert len(tried) <= 10
    assert largest_micro_batch(fits, 200) == max(1, int(0.85 * min(true_limit, 200)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormTest(0.0), "eta=0.0 must be above 0"),
        (lambda: InnerProductTest(theta=-1.0), "theta=-1.0 must be"),
        (lambda: InnerProductTest(nu=float("nan")), "nu=nan must be"),
        (lambda: largest_micro_batch(lambda _: False, 8), "not even one sample"),
        (functools.partial(largest_micro_batch, lambda _: True, 0), "limit=0 must be"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

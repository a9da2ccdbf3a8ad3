"""CO2: its recursion by hand, the clip, stability, what it costs."""

from __future__ import annotations

import functools
import gc
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from commkit.outer.co2 import CO2, momentum_for
from commkit.outer.options import SyncOptions
from commkit.outer.stability import co2_floor
from commkit.sim import ThreadComm, run_threads
from tests.outer.problem import Net

OPEN = SyncOptions(final_sync=False)


class Scalar(nn.Module):
    def __init__(self, value: float = 0.0, size: int = 1) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.full((size,), value, dtype=torch.float64))


def trajectory(
    rounds: int,
    gradient: Any,
    *,
    start: float = 0.0,
    ranks: int = 1,
    lrs: Any = lambda number: 1.0,
    **knobs: Any,
) -> list[float]:
    """x at the start of rounds 1, 2 ..., of one inner SGD step each: D = lr * gradient(x, rank)."""

    def run(comm: ThreadComm) -> list[float]:
        model = Scalar(start)
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        seen = []
        method = CO2(model, inner, sync_every=1, options=OPEN, process_group=comm, **knobs)
        with method:
            for number in range(rounds):
                inner.param_groups[0]["lr"] = lrs(number)
                model.x.grad = torch.full_like(model.x, gradient(model.x.item(), comm.rank))
                inner.step()
                seen.append(model.x.item())
        return seen

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of gaps chosen to diverge
        runs = run_threads(run, ranks)
    assert all(other == runs[0] for other in runs)
    return runs[0]


def test_constant_pseudo_gradients_by_hand() -> None:
    """D = mean(1, 3) = 2, gap 4, momentum .5: m = .5, .75, .875 ... and x -= .8 m, from the second round on."""
    seen = trajectory(
        4,
        lambda x, rank: 1.0 + 2 * rank,
        ranks=2,
        outer_lr=0.8,
        outer_momentum=0.5,
        staleness_gap=4.0,
    )
    assert seen == pytest.approx([0.0, -0.4, -1.0, -1.7])


def test_the_adaptive_gap_by_hand() -> None:
    """g = D / max(1.1 lr / (1 - beta), min(10, 1 + |last step| / |D|)); D is of x one round before."""
    lr, beta, kappa, rounds = 0.5, 0.3, 0.4, 8
    x = [1.0, 1.0]  # x_1 = x_0
    m, gaps = 0.0, []
    for number in range(1, rounds):
        d = kappa * x[number - 1]
        gaps.append(
            max(1.1 * lr / (1 - beta), min(10, 1 + abs(x[number] - x[number - 1]) / abs(d)))
        )
        m = beta * m + d / gaps[-1]
        x.append(x[number] - lr * m)
    assert len(set(gaps)) > rounds // 2, "the second term must have a say"
    seen = trajectory(
        rounds, lambda x, _: kappa * x, start=1.0, outer_lr=lr, outer_momentum=beta, clip=math.inf
    )
    assert seen == pytest.approx(x[1:], rel=1e-12)


def test_one_replica_that_does_not_move_stays() -> None:
    for gap in (1.0, "adaptive"):
        assert (
            trajectory(5, lambda x, _: 0.0, start=3.0, outer_momentum=0.0, staleness_gap=gap)
            == [3.0] * 5
        )


def test_an_absolute_clip_saturates() -> None:
    """m = 1, 1.5, 1.75 ... is held at 1.2: the clip changes m itself, so x falls by 1.2 a round."""
    knobs = {"outer_momentum": 0.5, "staleness_gap": 2.0, "clip_unit": "absolute"}
    clipped = trajectory(6, lambda x, _: 2.0, clip=1.2, **knobs)
    assert clipped == pytest.approx([0.0, -1.0, -2.2, -3.4, -4.6, -5.8])
    free = trajectory(6, lambda x, _: 2.0, clip=1e6, **knobs)
    assert free[-1] < clipped[-1]


def test_the_clip_limits_what_is_remembered() -> None:
    """After a spike of 100 m is 1, not 50, so the next round adds .5 * 1 and no more."""
    seen = trajectory(
        4,
        lambda x, _: 100.0 if x == 0.0 else 0.0,
        outer_momentum=0.5,
        staleness_gap=2.0,
        clip=1.0,
        clip_unit="absolute",
    )
    # The spike is sent twice: x has not moved yet when the second round ends.
    assert seen == pytest.approx([0.0, -1.0, -2.0, -2.5])


def test_a_clip_in_units_of_rms() -> None:
    """Elements (1, 0, 0, 0) have RMS 1/2: with clip=1 the first is held at .5."""

    def run(comm: ThreadComm) -> Tensor:
        model = Scalar(0.0, 4)
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        knobs: dict[str, Any] = {"outer_momentum": 0.0, "staleness_gap": 1.0, "clip": 1.0}
        with CO2(model, inner, sync_every=1, options=OPEN, process_group=comm, **knobs):
            for _ in range(2):
                model.x.grad = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
                inner.step()
            return model.x.detach().clone()

    assert run_threads(run, 1)[0].tolist() == pytest.approx([-0.5, 0.0, 0.0, 0.0])


def quadratic(rounds: int, kappa: float, **knobs: Any) -> float:
    """|x| in the end, of a minimum at 0 that one round of local training gets kappa nearer to."""
    seen = trajectory(rounds, lambda x, _: kappa * x, start=1.0, clip=math.inf, **knobs)
    return max(abs(x) for x in seen[-5:])


def test_stale_momentum_diverges_without_a_gap_and_converges_with_the_floor() -> None:
    assert quadratic(100, 0.9, outer_momentum=0.5, staleness_gap=1.0) > 1e3
    # The roots' product is beta + .9 / 2.2, so the error shrinks by its root, 0.953, per round.
    assert quadratic(150, 0.9, outer_momentum=0.5) < 2 * 0.9535**145


@pytest.mark.parametrize(("beta", "kappa"), [(0.0, 1.0), (0.5, 0.9), (0.6, 0.5)])
def test_the_bound_of_stability(beta: float, kappa: float) -> None:
    """lr kappa / gap + beta < 1, from both sides."""
    bound = kappa / (1 - beta)
    for factor, shrinks in ((1.05, True), (0.95, False)):
        knobs = {"outer_momentum": beta, "staleness_gap": factor * bound}
        early, late = (quadratic(rounds, kappa, **knobs) for rounds in (30, 300))
        assert (late < early / 10) if shrinks else (late > early * 10)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("kappa", [0.02, 0.3, 1.0])
def test_the_adaptive_gap_is_stable_at_any_momentum(beta: float, kappa: float) -> None:
    assert (
        quadratic(300, kappa, outer_momentum=beta) < quadratic(30, kappa, outer_momentum=beta) / 2
    )


def test_slowmo_without_the_delay() -> None:
    """u <- beta u + D / gamma; x <- x - alpha gamma u, with gamma of the round, which changes."""
    lrs, alpha, beta = [1.0, 0.5, 0.5, 0.1], 0.8, 0.6
    x, u, expected = 1.0, 0.0, []
    for lr in lrs:
        u = beta * u + 0.5 * x
        x -= alpha * lr * u
        expected.append(x)
    knobs: dict[str, Any] = {"outer_lr": alpha, "outer_momentum": beta, "staleness_gap": 1.0}
    seen = trajectory(
        4,
        lambda x, _: 0.5 * x,
        start=1.0,
        lrs=lambda number: lrs[number],
        delayed=False,
        normalise_lr=True,
        clip=math.inf,
        **knobs,
    )
    assert seen == pytest.approx(expected, rel=1e-12)


def test_the_learning_rate_is_that_of_the_round_of_the_outcome() -> None:
    """m counts gradients, 1 each; the first step moves by the first round's rate, not by the second's. A
    round of rate 0 has nothing to say."""
    lrs = [1.0, 0.1, 0.0, 0.01, 0.01]
    seen = trajectory(
        5,
        lambda x, _: 1.0,
        lrs=lambda number: lrs[number],
        outer_momentum=0.0,
        staleness_gap=1.0,
        normalise_lr=True,
        clip=1.0,
        clip_unit="absolute",
    )
    assert seen == pytest.approx([0.0, -1.0, -1.1, -1.1, -1.11])


@pytest.mark.parametrize(
    ("ranks", "beta"), [(1, 0.0), (16, 0.0), (17, 0.2), (32, 0.2), (33, 0.5), (64, 0.5), (65, 0.6)]
)
def test_momentum_by_the_number_of_ranks(ranks: int, beta: float) -> None:
    assert momentum_for(ranks) == beta


def test_twelve_bytes_per_parameter_between_the_ends_of_rounds() -> None:
    """Measured: all tensors that are alive with it, and not without, while an outcome waits to be used."""
    size = 100_000

    def alive() -> int:
        gc.collect()
        storages = {}
        for x in gc.get_objects():
            if type(x) in (Tensor, nn.Parameter):
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return sum(storages.values())

    def run(comm: ThreadComm) -> float:
        model = nn.Linear(size, 1, bias=False)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        model.weight.grad = torch.ones_like(model.weight)
        before = alive()
        with CO2(model, inner, sync_every=2, process_group=comm, options=OPEN) as outer:
            for _ in range(5):
                inner.step()
            outer._wait(outer._in_flight[0])
            return (alive() - before) / size

    assert run_threads(run, 1)[0] == pytest.approx(12, abs=0.05)


def test_a_gap_that_diverges_is_warned_of_with_the_figure() -> None:
    def run(comm: ThreadComm, **knobs: Any) -> None:
        model = Net(0)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        with CO2(model, inner, process_group=comm, **knobs):
            pass

    def start(**knobs: Any) -> None:
        run_threads(functools.partial(run, **knobs), 1)

    with pytest.warns(UserWarning, match=r"diverges once .* kappa=0\.5 of the way.*at least 2\.2"):
        start(outer_momentum=0.5, staleness_gap=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(outer_momentum=0.5, staleness_gap=co2_floor(1.0, 0.5))
        start(outer_momentum=0.9)
        start(outer_momentum=0.5, staleness_gap=1.0, delayed=False)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"sync_every": 0}, "sync_every=0 must be >= 1"),
        ({"outer_lr": 0.0}, "outer_lr=0.0 must be > 0"),
        ({"outer_momentum": 1.0}, r"outer_momentum=1.0 must be in \[0, 1\)"),
        ({"staleness_gap": 0.0}, "staleness_gap=0.0 must be > 0; use 'adaptive'"),
        ({"staleness_gap": "auto"}, "staleness_gap='auto' must be > 0"),
        ({"clip": 0.0}, "clip=0.0 must be > 0"),
        ({"clip": math.nan}, "clip=nan must be > 0"),
        ({"clip_unit": "l2"}, "clip_unit='l2' is unknown"),
    ],
)
def test_bad_knobs(knobs: dict[str, Any], message: str) -> None:
    model = Net(0)
    with pytest.raises(ValueError, match=message):
        CO2(model, torch.optim.SGD(model.parameters(), lr=0.1), **knobs)


def test_a_parameter_without_a_learning_rate() -> None:
    model = Net(0)
    inner = torch.optim.SGD(model.first.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"needs the learning rate of 'norm.weight'"):
        CO2(model, inner, normalise_lr=True)

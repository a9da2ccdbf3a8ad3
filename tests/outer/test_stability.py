"""Bounds on outer settings: as tabulated, in closed form, and against the recursions themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from commkit.outer import stability
from commkit.outer.pairing import random_groups


@pytest.mark.parametrize(
    ("alpha", "size", "bound"),
    [
        (0.5, 2, 1.5),
        (0.3, 2, math.sqrt(2.09)),
        (0.9, 2, 0.38),
        (0.0, 2, math.sqrt(2)),
        (0.5, 1, 1.0),
    ],
)
def test_noloco_bounds(alpha: float, size: int, bound: float) -> None:
    assert stability.noloco_bound(alpha, size) == pytest.approx(bound, rel=1e-12)


def test_noloco_band() -> None:
    low, high = stability.noloco_band(0.5)
    assert low == pytest.approx(0.5)
    assert high == pytest.approx(1.5)  # meets the mean-square bound here
    assert stability.noloco_band(0.3)[1] < 2 * (1 - 0.3**2)
    assert stability.noloco_band(0.9)[1] > 2 * (1 - 0.9**2)
    assert stability.noloco_band(0.5, 1) == (0, math.inf)


def spread(alpha: float, gamma: float, size: int, rounds: int, replicas: int = 64) -> float:
    """Variance of the replicas of NoLoCo without gradients, relative to its start."""
    phi = np.random.default_rng(0).standard_normal(replicas)
    momentum, first = np.zeros(replicas), phi.var()
    for r in range(rounds):
        for group in random_groups(replicas, size, 3, r):
            momentum[group] = alpha * momentum[group] - gamma * (phi[group] - phi[group].mean())
        phi = phi + momentum
    return float(phi.var() / first)


@pytest.mark.parametrize("alpha", [0.5, 0.7, 0.9])
def test_replicas_of_noloco_stay_together_below_the_bound_only(alpha: float) -> None:
    bound = stability.noloco_bound(alpha)
    assert spread(alpha, 0.8 * bound, 2, 400) < 1e-3
    assert spread(alpha, 1.3 * bound, 2, 400) > 1e3


def test_the_reference_cases_of_noloco() -> None:
    assert spread(0.5, 0.7, 2, 300) < 1e-30
    assert spread(0.9, 0.7, 2, 300) > 1e9


def test_gamma_out_of_range_names_the_bound() -> None:
    stability.check_gamma(0.7, 0.5)
    with pytest.raises(
        ValueError, match=r"gamma=0\.7 must be above 0 and below 0\.38 for alpha=0\.9"
    ):
        stability.check_gamma(0.7, 0.9)
    for gamma in (0.0, -1.0, math.nan, 1.5):
        with pytest.raises(ValueError, match="must be above 0 and below 1"):
            stability.check_gamma(gamma, 0.5)
    with pytest.raises(ValueError, match=r"alpha=1\.0 must be in \[0, 1\)"):
        stability.check_gamma(0.7, 1.0)
    with pytest.raises(ValueError, match="group_size=0 must be >= 1"):
        stability.noloco_bound(0.5, 0)


@pytest.mark.parametrize(
    ("momentum", "delay", "kappa"),
    [(0.9, 0, 1.93), (0.9, 1, 0.36), (0.8, 1, 0.49), (0.5, 1, 0.80), (0.0, 1, 1.42)],
)
def test_kappa_as_tabulated(momentum: float, delay: int, kappa: float) -> None:
    """The table cuts off after two digits, as a bound should."""
    assert math.floor(100 * stability.largest_stable_kappa(0.7, momentum, delay)) / 100 == kappa


def test_kappa_in_closed_form() -> None:
    for momentum in (0.0, 0.5, 0.9):
        # A root leaves at z = -1: 2 (1 + m) = lr kappa (1 + 2 m).
        synchronous = 2 * (1 + momentum) / (0.7 * (1 + 2 * momentum))
        assert stability.largest_stable_kappa(0.7, momentum, 0) == pytest.approx(
            synchronous, rel=1e-9
        )
    # Delay d without momentum: z^d (z - 1) + lr kappa has its first crossing at 2 sin(pi / (4 d + 2)).
    for delay in (1, 2, 5):
        expected = 2 * math.sin(math.pi / (4 * delay + 2)) / 0.7
        assert stability.largest_stable_kappa(0.7, 0, delay) == pytest.approx(expected, rel=1e-9)


def late_outer_steps(
    kappa: float, lr: float, momentum: float, delay: int, nesterov: bool, rounds: int = 20_000
) -> float:
    """|phi| after ``rounds`` outer steps from 1, by the recursion as it is written down."""
    anchors, b = [1.0] * (delay + 1), 0.0
    for _ in range(rounds):
        g = kappa * anchors[-1 - delay]
        b = momentum * b + g
        anchors.append(anchors[-1] - lr * (g + momentum * b if nesterov else b))
        if abs(anchors[-1]) > 1e9:
            break
    return max(map(abs, anchors[-20:]))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_kappa_against_the_recursion(momentum: float, delay: int, nesterov: bool) -> None:
    kappa = stability.largest_stable_kappa(0.7, momentum, delay, nesterov)
    assert late_outer_steps(0.97 * kappa, 0.7, momentum, delay, nesterov) < 1e-6
    assert late_outer_steps(1.03 * kappa, 0.7, momentum, delay, nesterov) > 1e6


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_co2_is_delay_one_with_heavy_ball(alpha: float, beta: float) -> None:
    for staleness_gap in (1.0, 2.5):
        kappa = stability.largest_stable_kappa(alpha / staleness_gap, beta, 1, nesterov=False)
        assert kappa == pytest.approx((1 - beta) * staleness_gap / alpha, rel=1e-9)
        assert stability.co2_is_stable(alpha, beta, staleness_gap, 0.999 * kappa)
        assert not stability.co2_is_stable(alpha, beta, staleness_gap, 1.001 * kappa)


def test_co2_needs_its_penalty() -> None:
    assert not stability.co2_is_stable(1.0, 0.5, 1.0, kappa=0.9)
    assert late_outer_steps(0.9, 1.0, 0.5, 1, False) > 1e6
    for beta in (0.0, 0.2, 0.5, 0.6, 0.9):
        assert stability.co2_is_stable(1.0, beta, stability.co2_floor(1.0, beta))


def test_utilisation_of_the_three_kinds() -> None:
    assert stability.utilisation(100, 0.1, 10.0) == pytest.approx(0.5)
    assert stability.utilisation(100, 0.1, 10.0, overlap_steps=50) == pytest.approx(10 / 15)
    assert stability.utilisation(100, 0.1, 10.0, overlap_steps=math.inf) == 1
    assert stability.utilisation(50, 0.1, 10.0, overlap_steps=math.inf) == pytest.approx(0.5)
    assert stability.utilisation(1, 0.1, 0.0) == 1


@pytest.mark.parametrize("overlap", [0, 3, 40, math.inf])
@pytest.mark.parametrize("target", [0.01, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("comm", [0.0, 0.01, 1.0, 77.7])
def test_smallest_sync_every_is_the_smallest(overlap: float, target: float, comm: float) -> None:
    h = stability.smallest_sync_every(target, 0.13, comm, overlap)
    assert stability.utilisation(h, 0.13, comm, overlap) >= target
    assert h == 1 or stability.utilisation(h - 1, 0.13, comm, overlap) < target


def test_smallest_sync_every_in_closed_form() -> None:
    assert stability.smallest_sync_every(0.9, 0.1, 1.234) == math.ceil(9 * 12.34)
    assert stability.smallest_sync_every(0.9, 0.1, 1.234, math.inf) == math.ceil(0.9 * 12.34)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: stability.largest_stable_kappa(0.0, 0.5, 1), "lr=0.0 must be above 0"),
        (lambda: stability.largest_stable_kappa(0.7, 1.0, 1), r"momentum=1.0 must be in \[0, 1\)"),
        (lambda: stability.largest_stable_kappa(0.7, 0.5, -1), "delay=-1 must be >= 0"),
        (lambda: stability.co2_is_stable(1.0, 0.5, 0.0), "staleness_gap=0.0 must be above 0"),
        (lambda: stability.co2_floor(1.0, 1.0), r"beta=1.0 must be in \[0, 1\)"),
        (lambda: stability.utilisation(0, 1.0, 1.0), "sync_every=0 must be >= 1"),
        (lambda: stability.utilisation(1, 0.0, 1.0), "step_seconds=0.0 must be above 0"),
        (lambda: stability.utilisation(1, 1.0, math.nan), "comm_seconds=nan must be >= 0"),
        (lambda: stability.utilisation(1, 1.0, 1.0, -1), "overlap_steps=-1 must be >= 0"),
        (
            lambda: stability.smallest_sync_every(1.0, 1.0, 1.0),
            "target=1.0 must be above 0 and below",
        ),
    ],
)
def test_settings_out_of_range(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

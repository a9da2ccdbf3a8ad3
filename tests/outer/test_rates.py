"""How often pairs meet, and the constants of their graph."""

from __future__ import annotations

import math

import numpy as np
import pytest

from commkit.outer.topologies import (
    Complete,
    Graph,
    Hypercube,
    OnePeerExponential,
    RandomPairs,
    Ring,
    RoundRobin,
    StaticExponential,
    Torus,
)
from commkit.outer.topologies.rates import gossip_constants, laplacian, pair_rates


@pytest.mark.parametrize(
    ("topology", "n"),
    [
        (Ring(), 7),
        (Torus(2, 4), 8),
        (StaticExponential(), 8),
        (OnePeerExponential(), 8),
        (Hypercube(), 8),
        (RoundRobin(), 7),
        (RandomPairs(), 6),
        (Complete(), 5),
        (Graph([[0, 1], [1, 2], [1, 3]]), 4),
    ],
)
def test_rates_follow_the_links(topology, n: int) -> None:
    mixing = topology.mixing(n)
    rates = pair_rates(mixing, 1.5)
    np.testing.assert_array_equal(rates, rates.T)
    assert rates.sum() == pytest.approx(1.5 * n)
    met = mixing.mean_matrix() + mixing.mean_matrix().T > 0
    np.testing.assert_array_equal(rates > 0, met & ~np.eye(n, dtype=bool))


def test_constants_of_a_ring_in_closed_form() -> None:
    """Links of rate 1/2; the way round a link is the n - 1 others."""
    for n in (3, 5, 8):
        constants = gossip_constants(pair_rates(Ring().mixing(n)))
        assert constants.chi1 == pytest.approx(1 / (1 - math.cos(2 * math.pi / n)))
        assert constants.chi2 == pytest.approx((n - 1) / n)


def test_constants_of_a_tree_and_of_a_pair() -> None:
    """A link without a way round has all of its own resistance."""
    line = np.zeros((3, 3))
    line[0, 1] = line[1, 0] = 2.0
    line[1, 2] = line[2, 1] = 0.25
    assert gossip_constants(line).chi2 == pytest.approx(2.0)
    assert gossip_constants(np.array([[0.0, 4.0], [4.0, 0.0]])).chi1 == pytest.approx(1 / 8)


def test_faster_meetings_scale_both() -> None:
    mixing = Torus(3, 3).mixing(9)
    slow, fast = (gossip_constants(pair_rates(mixing, rate)) for rate in (1.0, 4.0))
    assert fast.chi1 == pytest.approx(slow.chi1 / 4)
    assert fast.chi2 == pytest.approx(slow.chi2 / 4)


def test_rates_of_survivors() -> None:
    rates = pair_rates(Ring().mixing(5).without({0}))
    assert rates.shape == (4, 4)
    np.testing.assert_array_equal(rates > 0, abs(np.subtract.outer(range(4), range(4))) == 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pair_rates(Ring().mixing(3), 0.0), "rate=0.0 must be above 0"),
        (lambda: gossip_constants(np.zeros((1, 1))), "rates of 1 ranks have no pairs"),
        (lambda: gossip_constants(np.zeros((2, 2))), r"not connected: ranks \[0\] and \[1\]"),
        (lambda: laplacian(np.array([[0.0, 1.0], [2.0, 0.0]])), "must be symmetric"),
        (lambda: laplacian(np.eye(2)), "0 on the diagonal"),
    ],
)
def test_what_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

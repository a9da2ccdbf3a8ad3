"""What dynamic backup workers estimate, against what is true."""

import itertools

import numpy as np
import pytest

from commkit.straggler.backup import best_k
from commkit.straggler.estimates import (
    GainEstimates,
    TimeTable,
    expected_gain,
    noise_scale_gain,
    variance_of,
)


def test_variance_and_gradient_norm_are_unbiased() -> None:
    state, dim, k, trials = np.random.RandomState(0), 6, 4, 20000
    mean = np.linspace(-1, 1, dim)
    spread = np.array([0.5, 1.0, 2.0, 0.1, 1.0, 3.0])
    g = mean + spread * state.standard_normal((trials, k, dim))
    m2 = (g.mean(axis=1) ** 2).sum(axis=1)
    variances = np.array(
        [variance_of(row.tolist(), s) for row, s in zip((g**2).sum(-1), m2, strict=True)]
    )
    gradients = m2 - variances / k

    def z(sample: np.ndarray, truth: float) -> float:
        return abs(sample.mean() - truth) / (sample.std() / np.sqrt(trials))

    assert z(variances, (spread**2).sum()) < 4
    assert z(gradients, (mean**2).sum()) < 4
    # and with the naive ones the test would notice
    assert z(m2, (mean**2).sum()) > 10
    assert z(variances * (k - 1) / k, (spread**2).sum()) > 10


def test_variance_from_norms_is_that_of_the_vectors() -> None:
    g = np.random.RandomState(1).standard_normal((5, 7))
    direct = ((g - g.mean(axis=0)) ** 2).sum() / 4
    m2 = float((g.mean(axis=0) ** 2).sum())
    assert variance_of((g**2).sum(axis=1).tolist(), m2) == pytest.approx(direct)
    assert variance_of([3.0], 3.0) is None


def test_smoothness_of_a_quadratic_is_its_curvature() -> None:
    """f = L x^2 / 2 without noise: the realised decrease tells L exactly."""
    L, lr, x = 4.0, 0.05, 3.0
    gains = GainEstimates(window=5)
    for _ in range(8):
        g = L * x
        gains.add([g**2, g**2], g**2, [L * x**2 / 2] * 2, lr)
        x -= lr * g
    assert gains.smoothness == pytest.approx(L)
    # As of the window: five gradients in a row, each (1 - L lr)^2 times the one before.
    recent = [(L * 3.0 * (1 - L * lr) ** t) ** 2 for t in range(3, 8)]
    assert gains.gradient == pytest.approx(np.mean(recent))
    assert gains.variance == pytest.approx(0, abs=1e-9)
    assert gains.loss_growth < 0


def test_smoothness_with_noise_is_near_the_curvature() -> None:
    state, L, lr, n = np.random.RandomState(0), 4.0, 0.05, 8
    x, gains = np.full(20, 3.0), GainEstimates(window=2000)
    for _ in range(2000):
        g = L * x + 10 * state.standard_normal((n, 20))
        m = g.mean(axis=0)
        gains.add((g**2).sum(1).tolist(), float(m @ m), [L * float(x @ x) / 2] * n, lr)
        x = x - lr * m
    assert gains.smoothness == pytest.approx(L, rel=0.1)
    assert gains.variance == pytest.approx(2000, rel=0.05)


def test_smoothness_is_clamped() -> None:
    rising, falling = GainEstimates(5), GainEstimates(5)
    for t in range(4):
        rising.add([1.0, 1.0], 1.0, [10.0 * (t + 1)], 0.1)
        falling.add([1.0, 1.0], 1.0, [-10.0 * t], 0.1)
    assert rising.smoothness == pytest.approx(1.98 / 0.1)
    assert falling.smoothness == 0
    assert rising.loss_growth > 0.01 > 0 > falling.loss_growth


def test_a_rise_that_the_noise_of_the_batches_explains_is_none() -> None:
    """Losses of eight workers spread by 10 %, so that a half window's mean moves by about 2.5 %."""
    state = np.random.RandomState(0)

    def alarms(growth_per_step: float) -> float:
        found = []
        for _ in range(300):
            gains = GainEstimates(window=5)
            for t in range(5):
                losses = (1 + growth_per_step) ** t * (1 + 0.1 * state.standard_normal(8))
                gains.add([1.0] * 8, 1.0, losses.tolist(), 0.1)
            found.append(gains.loss_growth > 0.01)
        return float(np.mean(found))

    assert alarms(0.0) < 0.05
    assert alarms(0.1) > 0.95


def test_one_gradient_reuses_the_last_variance() -> None:
    gains = GainEstimates(5)
    gains.add([4.0, 6.0], 2.0, [1.0], 0.1)
    assert gains.variance == pytest.approx(6.0)
    gains.add([9.0], 9.0, [1.0], 0.1)
    assert gains.variance == pytest.approx(6.0)


@pytest.mark.parametrize(("gradient", "k"), [(42, 2), (4.2, 10), (0.85, 16)])
def test_few_early_and_all_late(gradient: float, k: int) -> None:
    """n=16, eta=.05, L=4, V=200, T(k)=0.3+sum 1/(n-i): the reference's example."""
    n = 16
    times = 0.3 + np.cumsum([1 / (n - i) for i in range(n)])
    gains = expected_gain(np.arange(1.0, n + 1), 0.05, 4.0, gradient, 200.0)
    assert best_k(gains, times) == k


def test_noise_scale_gain_grows_with_k_up_to_1() -> None:
    k = np.arange(1.0, 9)
    gain = noise_scale_gain(k, 2.0, 8.0)
    np.testing.assert_allclose(gain, k / (k + 4))
    assert not noise_scale_gain(k, 0.0, 8.0).any()


def test_times_are_means_made_monotone() -> None:
    table = TimeTable(4)
    for h, place, seconds in [
        (4, 1, 1.0),
        (4, 1, 3.0),
        (4, 2, 1.5),
        (4, 3, 5.0),
        (2, 1, 1.0),
        (2, 2, 6.0),
    ]:
        table.add(h, place, seconds)
    # Row 4: means 2, 1.5, 5 with weights 2, 1, 1. Row 2, whose stragglers start late, must not be faster:
    # its 1.0 is pooled with them.
    pooled = (1.0 + 3.0 + 1.5 + 1.0) / 4
    np.testing.assert_allclose(table.estimate(4), [pooled, pooled, 5.0, 5.0], atol=1e-6)
    np.testing.assert_allclose(table.estimate(2), [pooled, 6.0, 6.0, 6.0], atol=1e-6)
    # Unvisited rows have the bounds of those that awaited fewer, or, if there are none, of those that awaited more.
    np.testing.assert_allclose(table.estimate(3), [pooled, 6.0, 6.0, 6.0], atol=1e-6)
    np.testing.assert_allclose(table.estimate(1), table.estimate(2))


def test_a_slow_place_is_not_forgotten_when_another_number_was_awaited() -> None:
    table = TimeTable(8)
    for h, times in [(5, [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.4]), (6, [0.1] * 6)]:
        for place, seconds in enumerate(times, start=1):
            table.add(h, place, seconds)
    assert table.observed == 7
    np.testing.assert_allclose(table.estimate(6), [0.1] * 6 + [0.4] * 2)
    np.testing.assert_allclose(table.estimate(7), [0.1] * 6 + [0.4] * 2)


def test_times_of_nothing_are_zero_and_any_table_is_monotone() -> None:
    assert not TimeTable(3).estimate(3).any()
    state, table = np.random.RandomState(0), TimeTable(6)
    for _ in range(40):
        h, received = state.randint(1, 7), state.randint(1, 7)
        for place, seconds in enumerate(np.sort(state.exponential(size=received)), start=1):
            table.add(h, place, float(seconds))
    rows = [table.estimate(h) for h in range(1, 7)]
    assert all((np.diff(row) >= 0).all() for row in rows)
    assert all((after <= before + 1e-9).all() for before, after in itertools.pairwise(rows))


def test_fewer_workers_keep_what_is_known_of_them() -> None:
    table = TimeTable(4)
    table.add(2, 1, 1.0)
    table.add(4, 4, 9.0)
    table.resize(3)
    np.testing.assert_allclose(table.estimate(2), [1, 1, 1])
    table.resize(5)
    assert table.estimate(2).shape == (5,)
    with pytest.raises(ValueError, match="the state is of 5 workers, but there are 4"):
        TimeTable(4).load_state_dict(table.state_dict())

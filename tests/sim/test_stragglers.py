"""Delay models have the distributions they name, and the clock moves as workers do."""

import numpy as np
import pytest

from commkit.sim import BackupClock, Bursts, Pareto, ShiftedExponential, Trace


@pytest.mark.parametrize(
    "model", [ShiftedExponential(1.0, 0.5), Pareto(1.0, 2.5), Bursts(1.0, 0.05, 0.5, 5.0)]
)
def test_equal_seeds_give_equal_times(model: object) -> None:
    a, b, c = (model.seconds(20, 8, seed) for seed in (1, 1, 2))  # type: ignore[attr-defined]
    assert a.shape == (20, 8)
    assert (a > 0).all()
    assert (a == b).all()
    assert (a != c).any()


def test_distributions() -> None:
    exponential = ShiftedExponential(1.0, 0.5).seconds(400, 100, 0)
    assert exponential.min() >= 1
    assert exponential.mean() == pytest.approx(1.5, rel=0.02)
    heavy = Pareto(2.0, 3.0).seconds(400, 100, 0)
    assert heavy.min() >= 2
    for t in (3.0, 6.0):
        assert (heavy > t).mean() == pytest.approx((2 / t) ** 3, rel=0.1)


def test_bursts_last_and_return_as_their_chain_says() -> None:
    seconds = Bursts(1.0, enter=0.04, leave=0.4, slowdown=6.0, jitter=0.01, tail=0.0).seconds(
        3000, 50, 0
    )
    slow = seconds > 3
    assert slow.mean() == pytest.approx(0.04 / 0.44, rel=0.05)
    assert (slow[1:] & slow[:-1]).sum() / slow[:-1].sum() == pytest.approx(0.6, rel=0.05)
    assert np.median(seconds[slow]) == pytest.approx(6, rel=0.01)


def test_traces_are_played_again_in_order() -> None:
    recorded = np.arange(1.0, 13).reshape(4, 3)
    seconds = Trace(recorded).seconds(9, 2, seed=5)
    first = int(np.flatnonzero(recorded[:, 0] == seconds[0, 0])[0])
    np.testing.assert_array_equal(seconds, recorded[(first + np.arange(9)) % 4, :2])
    with pytest.raises(ValueError, match="num_workers=4 must be <= 3"):
        Trace(recorded).seconds(1, 4, 0)


def test_stragglers_start_the_next_step_late() -> None:
    clock = BackupClock(
        np.array([[1.0, 2.0, 5.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [9.0, 9.0, 1.0]])
    )
    assert clock.wait(2) == ([0, 1], [1.0, 2.0])
    assert clock.now == 2
    assert clock.wait(2) == ([0, 1], [1.0, 1.0])  # 2 to 3; worker 2 is busy until 5 and skips it
    assert list(clock.late()) == []
    assert clock.wait(3) == ([0, 1, 2], [1.0, 1.0, 3.0])  # 3 to 6; worker 2 begins at 5
    assert list(clock.late()) == [(0, 5.0)]
    assert clock.wait(1) == ([2], [1.0])
    assert list(clock.late()) == []


def test_interrupted_workers_start_over_at_once() -> None:
    clock = BackupClock(np.array([[1.0, 2.0, 5.0]]), interrupt=True)
    assert clock.wait(2) == ([0, 1], [1.0, 2.0])
    assert clock.wait(3) == ([0, 1, 2], [1.0, 2.0, 5.0])
    assert clock.now == 7
    assert list(clock.late()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShiftedExponential(0.0, 1.0), r"constant=0\.0 must be > 0"),
        (lambda: Pareto(1.0, -1.0), r"shape=-1\.0 must be > 0"),
        (lambda: Bursts(1.0, 2.0, 0.5, 5.0), r"enter=2\.0 and leave=0\.5 are probabilities"),
        (lambda: Bursts(1.0, 0.1, 0.5, 1.0), r"slowdown=1\.0 must be > 1"),
        (lambda: Trace(np.zeros((2, 2))), r"recorded has shape \(2, 2\)"),
    ],
)
def test_bad_settings_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]

"""The mu-rule, and the choice of parameters by replaying recorded times."""

import math

import numpy as np
import pytest

from commkit.straggler import (
    Candidate,
    DelayProfile,
    MuRule,
    candidates,
    fit_slope,
    replay,
    select,
)
from tests.straggler.patterns import gradient_coding, m_sgc


def always(late: object) -> bool:
    return True


def test_a_round_closes_at_the_deadline_without_those_that_may_be_late() -> None:
    assert MuRule(1.0).close([1.0, 1.5, 2.0, 9.0], always) == (2.0, {3})
    assert MuRule(1.0).close([1.0, 1.5, 1.9, 1.8], always) == (1.9, frozenset())  # nobody is late
    assert MuRule(0.0).close([1.0, 1.5, 2.0, 9.0], always) == (1.0, {1, 2, 3})


def test_otherwise_it_waits_for_one_after_the_other() -> None:
    times = [1.0, 7.0, 1.1, 5.0, math.inf, 6.0]
    assert MuRule(1.0).close(times, lambda late: len(late) <= 1) == (7.0, {4})
    assert MuRule(1.0).close(times, lambda late: len(late) <= 2) == (6.0, {1, 4})
    assert MuRule(1.0).close(times, lambda late: not late) == (math.inf, frozenset())


def test_the_recorded_pattern_counts_and_not_the_times() -> None:
    """A worker that is slow twice is waited for the second time, as the design has it."""
    schedule, rule, slow = m_sgc(4, 1, 2, 2), MuRule(1.0), [1.0, 1.0, 1.0, 4.0]
    seen = []
    for _ in range(4):
        seconds, late = rule.close(slow, schedule.fits)
        schedule.record(late)
        seen.append((seconds, sorted(late)))
    assert seen == [(2.0, [3]), (4.0, []), (2.0, [3]), (4.0, [])]


@pytest.mark.parametrize("mu", [-0.1, math.inf, math.nan])
def test_mu_out_of_range_is_refused(mu: float) -> None:
    with pytest.raises(ValueError, match=r"mu=.* must be >= 0 and finite"):
        MuRule(mu)


def bursts(rounds: int, n: int, share: float, slowdown: float) -> np.ndarray:
    """Times of 1 s with a little noise, of which some are ``slowdown`` times longer."""
    state = np.random.RandomState(0)
    times = 1 + 0.05 * state.uniform(size=(rounds, n))
    return np.where(state.uniform(size=times.shape) < share, slowdown * times, times)


def test_replay_is_the_coordinators_loop() -> None:
    profile = DelayProfile(bursts(30, 8, 0.1, 5.0), load=1 / 8, slope=2.0)
    replayed = replay(Candidate("gradient_coding", 1), profile, MuRule(), 30, code="auto")
    schedule, total = gradient_coding(8, 1), 0.0
    for r in range(30):
        times = profile.seconds[r] + 2.0 * (2 / 8 - 1 / 8)
        seconds, late = MuRule().close(times.tolist(), schedule.fits)
        schedule.record(late)
        total += seconds
    assert replayed.total == pytest.approx(total)
    assert replayed == replay(Candidate("gradient_coding", 1), profile, MuRule(), 30, code="auto")


def test_selection_finds_no_redundancy_where_nobody_straggles() -> None:
    profile = DelayProfile(bursts(20, 8, 0.0, 1.0), load=1 / 8, slope=4.0)
    best = select(profile, candidates(8, max_delay=2))[0]
    assert best.load == pytest.approx(1 / 8)
    assert best.delay == 0
    assert best.candidate == Candidate("gradient_coding", 0)


def test_selection_takes_gradient_coding_if_work_is_free_and_m_sgc_if_it_is_not() -> None:
    times = bursts(40, 8, 0.08, 6.0)
    free = select(DelayProfile(times, 1 / 8, slope=0.0), candidates(8, max_delay=2))
    uncoded = next(r for r in free if r.candidate == Candidate("gradient_coding", 0))
    assert free[0].total < 0.5 * uncoded.total
    dear = select(DelayProfile(times, 1 / 8, slope=8.0), candidates(8, max_delay=2))
    assert dear[0].candidate.scheme == "m_sgc"
    coded = min(r.total for r in dear if r.candidate.scheme == "gradient_coding")
    assert dear[0].total < coded
    assert [r.total for r in dear] == sorted(r.total for r in dear)


def test_candidates_keep_to_the_delay_and_can_be_built() -> None:
    tried = list(candidates(8, max_delay=3))
    assert len(set(tried)) == len(tried)
    for candidate in tried:
        schedule = candidate.build(8, 5)
        assert schedule.delay <= 3
        assert schedule.plan()
    assert {c.scheme for c in tried} == {"gradient_coding", "sr_sgc", "m_sgc"}
    assert {c.scheme for c in candidates(8, max_delay=0)} == {"gradient_coding"}


def test_slope() -> None:
    loads = np.array([0.1, 0.2, 0.4])
    assert fit_slope(loads, 3 + 5 * loads) == pytest.approx(5)
    assert fit_slope(loads, 3 - 5 * loads) == 0
    with pytest.raises(ValueError, match=r"loads are all 0\.1"):
        fit_slope(np.full(3, 0.1), loads)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones(3), 0.5, 0.0), r"seconds has shape \(3,\)"),
        ((np.zeros((2, 3)), 0.5, 0.0), "all must be > 0"),
        ((np.ones((2, 3)), 0.0, 0.0), r"load=0\.0 must be in"),
        ((np.ones((2, 3)), 0.5, -1.0), r"slope=-1\.0 must be >= 0"),
    ],
)
def test_profiles_out_of_range_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DelayProfile(*arguments)  # type: ignore[arg-type]


def test_nothing_to_select_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="tried is empty"):
        select(DelayProfile(np.ones((2, 4)), 0.25, 0.0), [])

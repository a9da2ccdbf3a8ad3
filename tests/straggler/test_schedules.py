"""Schedules: worked examples, loads, plans, state, and what they refuse."""

import json
import random

import pytest

from commkit.straggler import MSGC, SRSGC, GradientCoding, NotDecodable, Schedule, make_code
from tests.straggler.patterns import Trial, admissible, code, gradient_coding, m_sgc, run, sr_sgc


def jobs_of(schedule: Schedule) -> list[list[tuple[int, bool]]]:
    """For each worker, (job, coded) of its mini-tasks."""
    return [[(task.job, task.coded) for task in tasks] for tasks in schedule.plan()]


def test_worked_example_of_m_sgc() -> None:
    """n=4, B=1, W=2, lambda=2; worker 1 straggles in round 0, worker 3 in round 2."""
    schedule = m_sgc(4, 1, 2, 2, num_jobs=3)
    assert (schedule.delay, schedule.num_units, schedule.num_rounds) == (1, 16, 4)
    trial, raw, coded = Trial(schedule), False, True
    expected = [
        [[(0, raw)]] * 4,
        [[(1, raw), (0, raw if i == 1 else coded)] for i in range(4)],
        [[(2, raw), (1, coded)]] * 4,
        [[(2, raw if i == 3 else coded)] for i in range(4)],
    ]
    for late, plan in zip([{1}, set(), {3}, set()], expected, strict=True):
        assert jobs_of(schedule) == plan
        assert schedule.fits(late)
        trial.round(late)
    assert sorted(trial.errors) == [0, 1, 2]
    assert max(trial.errors.values()) < 1e-12
    # D1 is 3/16 of the data per worker, of which worker 1 tried its own of job 0 twice.
    assert trial.attempts[0, 1, 0] == 2
    assert trial.units_read[1] == [6, 6, 6, 6]


def test_worked_example_of_sr_sgc() -> None:
    """n=4, B=1, W=2, lambda=2, so s=1; workers 1 and 3 straggle in round 0."""
    schedule = sr_sgc(4, 1, 2, 2, num_jobs=2)
    assert (schedule.num_stragglers, schedule.delay, schedule.load) == (1, 1, 0.5)
    trial = Trial(schedule)
    trial.round({1, 3})
    assert not schedule.decodable(0)
    assert schedule.missing(0) == (1, 3)
    assert jobs_of(schedule) == [[(1, True)], [(0, True)], [(1, True)], [(1, True)]]
    trial.round(())
    assert schedule.missing(0) == (3,)
    assert jobs_of(schedule) == [[], [], [], []]  # job 1 needs no repair
    trial.round(())
    assert sorted(trial.errors) == [0, 1]
    assert max(trial.errors.values()) < 1e-12


@pytest.mark.parametrize(
    ("make", "load"),
    [
        (lambda: gradient_coding(4, 0), 1 / 4),
        (lambda: gradient_coding(4, 2), 3 / 4),
        (lambda: sr_sgc(4, 1, 2, 2), 2 / 4),
        (lambda: m_sgc(4, 1, 2, 2), 0.375),
        (lambda: gradient_coding(8, 3), 4 / 8),
        (lambda: m_sgc(8, 2, 4, 3), 4 * 5 / (8 * (2 + 3 * 4))),
        (lambda: m_sgc(6, 2, 4, 6), 5 / (6 * 3)),
        (lambda: m_sgc(6, 1, 4, 0), 1 / 6),
        (lambda: m_sgc(4, 1, 1, 1), 2 / 4),
        (lambda: sr_sgc(9, 2, 3, 4), 3 / 9),
    ],
)
def test_loads_are_those_of_the_formulas_and_of_the_plans(make: object, load: float) -> None:
    schedule: Schedule = make()  # type: ignore[operator]
    assert schedule.load == pytest.approx(load, rel=1e-12)
    rng, trial = random.Random(0), Trial(schedule)
    for _ in range(3 * (schedule.delay + 1)):
        trial.round(admissible(schedule, rng, 0.5))
    per_round = [[units / schedule.num_units for units in row] for row in trial.units_read]
    assert max(map(max, per_round)) == pytest.approx(load, rel=1e-12)
    steady = per_round[schedule.delay :]
    if not (isinstance(schedule, MSGC) and schedule.stragglers == schedule.num_workers):
        assert all(x == pytest.approx(load) for row in steady for x in row)


def test_loads_of_the_paper() -> None:
    """256 workers; Krishnan et al. 2023, table 1."""
    assert GradientCoding(256, 15, None).load == 0.0625
    assert SRSGC(256, 2, 3, 23, None).load == pytest.approx(0.051, abs=5e-4)
    assert MSGC(256, 1, 2, 27, None).load == pytest.approx(0.0075, abs=5e-5)


def test_chunks_cover_a_job_once_uncoded_and_lambda_plus_one_times_coded() -> None:
    schedule, seen = m_sgc(8, 2, 4, 3, num_jobs=1), {}
    while schedule.round < schedule.num_rounds:
        for tasks in schedule.plan():
            for task in tasks:
                for chunk in task.chunks:
                    for unit in range(chunk.start, chunk.stop):
                        seen[unit] = seen.get(unit, 0) + 1
        schedule.record(())
    split = 8 * 3 * 4
    assert [seen[u] for u in range(split)] == [1] * split
    assert [seen[u] for u in range(split, schedule.num_units)] == [4] * (schedule.num_units - split)


def test_raw_results_may_be_added_up_at_once() -> None:
    """Uncoded results have weight 1 whatever else arrives, as MiniTask says."""
    schedule = m_sgc(8, 2, 4, 3, num_jobs=6)
    rng = random.Random(3)
    while schedule.round < schedule.num_rounds:
        coded = {(t.worker, t.index) for tasks in schedule.plan() for t in tasks if t.coded}
        assert all(index >= 3 for _, index in coded)
        schedule.record(admissible(schedule, rng, 0.7))
        if schedule.due is not None:
            weights = schedule.decode(schedule.due)
            assert all(weights[i, k] == 1 for i in range(8) for k in range(3))


@pytest.mark.parametrize(
    "make", [lambda: gradient_coding(6, 2), lambda: sr_sgc(6, 2, 3, 4), lambda: m_sgc(6, 2, 4, 2)]
)
def test_state_goes_through_json_and_replays_alike(make: object) -> None:
    whole: Schedule = make()  # type: ignore[operator]
    patterns, plans = [], []
    rng = random.Random(5)
    for _ in range(16):
        patterns.append(admissible(whole, rng, 0.6))
        plans.append(whole.plan())
        whole.record(patterns[-1])

    first: Schedule = make()  # type: ignore[operator]
    for late in patterns[:7]:
        first.record(late)
    resumed: Schedule = make()  # type: ignore[operator]
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for late, plan in zip(patterns[7:], plans[7:], strict=True):
        assert resumed.plan() == plan
        assert resumed.fits(late)
        resumed.record(late)
    assert resumed.state_dict() == whole.state_dict()
    with pytest.raises(ValueError, match="the state is of schedule"):
        m_sgc(6, 1, 2, 2).load_state_dict(first.state_dict())


def test_stopping_drains_what_is_open() -> None:
    schedule = m_sgc(6, 2, 4, 2)
    trial = run(schedule, [()] * 10)
    assert schedule.open_jobs == (6, 7, 8, 9)
    schedule.stop()
    for _ in range(schedule.delay):
        trial.round(())
    assert schedule.open_jobs == ()
    assert sorted(trial.errors) == list(range(10))
    assert schedule.round == schedule.num_rounds


def test_a_dead_worker_is_tolerated_as_far_as_the_code_goes() -> None:
    coded = gradient_coding(6, 1)
    for _ in range(20):
        assert coded.fits({4})
        assert coded.lost_jobs({4}, dead={4}) == ()
        coded.record({4})
        assert coded.decodable(coded.round - 1)
    assert not coded.fits({4, 1})
    assert coded.lost_jobs({4, 1}, dead={4, 1}) == (20,)

    multiplexed = m_sgc(6, 1, 2, 2)
    multiplexed.record(())
    # Job 0 has all its D1 results and can do without worker 4's coded one; job 1 can not.
    assert multiplexed.lost_jobs({4}, dead={4}) == (1,)
    assert multiplexed.lost_jobs({4}, dead=()) == ()
    before = multiplexed.state_dict()
    assert multiplexed.state_dict() == before


def test_what_cannot_be_decoded_names_who_is_missing() -> None:
    schedule = gradient_coding(4, 1)
    schedule.record({0, 2})  # both copies of block 0
    with pytest.raises(
        NotDecodable, match=r"job 0 cannot be decoded .* workers \[0, 2\]"
    ) as caught:
        schedule.decode(0)
    assert caught.value.workers == (0, 2)

    schedule = m_sgc(4, 1, 2, 2)
    schedule.record({1})
    schedule.record({1})  # which does not fit
    with pytest.raises(NotDecodable, match=r"workers \[1\]"):
        schedule.decode(0)
    with pytest.raises(ValueError, match="job=7 is not under way in round 2"):
        schedule.decode(7)
    with pytest.raises(ValueError, match=r"worker 4 must be in 0\.\.3"):
        schedule.fits({4})


def test_a_broken_promise_is_forgotten_when_its_jobs_are() -> None:
    for schedule in (sr_sgc(4, 1, 2, 2), m_sgc(4, 1, 2, 2)):
        schedule.record({0, 1, 2})
        assert not schedule.fits({3})
        for _ in range(3):
            schedule.record(())
        assert schedule.fits({3})


def test_round_closes_without_more_than_s_where_repetition_allows() -> None:
    schedule = gradient_coding(12, 2)
    assert schedule.fits({4, 8, 1, 9, 6})
    assert not schedule.fits({0, 4, 8})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SRSGC(4, 2, 4, 2, None),
            r"rounds=4 must be a multiple of burst=2 plus 1 .*rounds=5",
        ),
        (
            lambda: SRSGC(4, 1, 1, 2, None),
            r"rounds=1 must be a multiple of burst=1 plus 1 .*rounds=2",
        ),
        (lambda: SRSGC(4, 1, 2, 5, None), r"stragglers=5 must be <= num_workers=4"),
        (lambda: MSGC(4, 2, 2, 1, None), r"rounds=2 must be > burst=2 for m_sgc.*rounds=3"),
        (lambda: MSGC(4, 1, 1, 4, None), r"stragglers=4 must be < num_workers with rounds=1"),
        (lambda: MSGC(4, 1, 2, 4, code(4, 1)), r"needs no code; give None"),
        (lambda: MSGC(4, 1, 2, 2, code(4, 1)), r"code is for num_workers=4, num_stragglers=1"),
        (lambda: GradientCoding(8, 1, make_code(4, 1)), r"make_code\(8, 1\)"),
        (lambda: GradientCoding(4, 4, None), r"num_stragglers=4 must be >= 0 and <"),
        (lambda: GradientCoding(4, 1, None, num_jobs=-1), r"num_jobs=-1 must be >= 0"),
        (lambda: GradientCoding(4, 1, None).plan(), r"code=None: this schedule only counts"),
    ],
)
def test_bad_input_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]

"""Every pattern that a schedule's model admits decodes in time: all of them for 4 workers, samples for more."""

import random
from collections.abc import Callable

import pytest

from commkit.straggler import Arbitrary, Bursty, Schedule, StragglerModel
from commkit.straggler.masks import members
from tests.straggler.patterns import (
    Trial,
    admissible,
    gradient_coding,
    m_sgc,
    signature,
    sr_sgc,
)

FOUR = {
    "gc(4,1)": lambda: gradient_coding(4, 1),
    "gc(4,3)": lambda: gradient_coding(4, 3),
    "sr_sgc(4,1,2,1)": lambda: sr_sgc(4, 1, 2, 1),
    "sr_sgc(4,1,2,2)": lambda: sr_sgc(4, 1, 2, 2),
    "sr_sgc(4,1,2,3)": lambda: sr_sgc(4, 1, 2, 3),
    "sr_sgc(4,1,2,4)": lambda: sr_sgc(4, 1, 2, 4),
    "sr_sgc(4,1,3,3)": lambda: sr_sgc(4, 1, 3, 3),
    "sr_sgc(4,2,3,2)": lambda: sr_sgc(4, 2, 3, 2),
    "sr_sgc(4,2,3,3)": lambda: sr_sgc(4, 2, 3, 3),
    "m_sgc(4,1,1,2)": lambda: m_sgc(4, 1, 1, 2),
    "m_sgc(4,1,2,0)": lambda: m_sgc(4, 1, 2, 0),
    "m_sgc(4,1,2,1)": lambda: m_sgc(4, 1, 2, 1),
    "m_sgc(4,1,2,2)": lambda: m_sgc(4, 1, 2, 2),
    "m_sgc(4,1,2,3)": lambda: m_sgc(4, 1, 2, 3),
    "m_sgc(4,1,2,4)": lambda: m_sgc(4, 1, 2, 4),
    "m_sgc(4,2,3,1)": lambda: m_sgc(4, 2, 3, 1),
    "m_sgc(4,1,3,2)": lambda: m_sgc(4, 1, 3, 2),
}


def explore(schedule: Schedule, limit: int) -> tuple[int, int]:
    """Visit every state that admissible rounds lead to, and decode what is due in each: patterns of any
    length. Returns the numbers of states and of transitions."""
    start = schedule.state_dict()
    seen, ahead, transitions = {signature(schedule)}, [start], 0
    while ahead:
        state = ahead.pop()
        schedule.load_state_dict(state)
        fitting = [m for m in range(1 << schedule.num_workers) if schedule.fits(members(m))]
        for mask in fitting:
            schedule.load_state_dict(state)
            schedule.record(members(mask))
            transitions += 1
            if schedule.due is not None:
                assert schedule.decodable(schedule.due), (members(mask), state)
            key = signature(schedule)
            if key not in seen:
                seen.add(key)
                ahead.append(schedule.state_dict())
        assert len(seen) <= limit
    return len(seen), transitions


@pytest.mark.parametrize("name", FOUR)
def test_all_patterns_of_four_workers(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    states, transitions = explore(FOUR[name](), limit=6000)
    print(f"{name}: {states} states, {transitions} transitions, all decode")
    record_property("explored", [states, transitions])


@pytest.mark.parametrize(
    ("make", "models"),
    [
        (lambda: sr_sgc(4, 1, 2, 2), [Bursty(1, 2, 2)]),
        (lambda: sr_sgc(4, 2, 3, 2), [Bursty(2, 3, 2)]),
        (lambda: m_sgc(4, 1, 2, 2), [Bursty(1, 2, 2), Arbitrary(1, 2, 2)]),
        (lambda: m_sgc(4, 2, 3, 2), [Bursty(2, 3, 2), Arbitrary(2, 4, 2)]),
    ],
    ids=["sr_sgc-1", "sr_sgc-2", "m_sgc-1", "m_sgc-2"],
)
def test_what_the_design_models_admit_fits(make: object, models: list[StragglerModel]) -> None:
    """The check is not stricter than the published models."""
    rng = random.Random(1)
    for model in models:
        for _ in range(40):
            schedule: Schedule = make()  # type: ignore[operator]
            pattern: list[int] = []
            for _ in range(12):
                mask = rng.getrandbits(4) & rng.getrandbits(4)
                while not model.admits_next(pattern, mask):
                    mask &= rng.getrandbits(4)
                assert schedule.fits(members(mask)), (model, pattern, mask)
                schedule.record(members(mask))
                pattern.append(mask)


SAMPLED = [
    *((name, n, args) for n in (5, 8, 12) for name, args in [("gc", (2,)), ("gc", (n - 1,))]),
    *(
        ("sr_sgc", n, args)
        for n in (6, 8, 16, 32)
        for args in [(1, 2, 3), (2, 3, 4), (1, 4, 4), (2, 5, 6)]
    ),
    *(
        ("m_sgc", n, args)
        for n in (5, 8, 16, 32)
        for args in [(1, 2, 3), (2, 4, 3), (1, 1, 2), (3, 5, n)]
    ),
]


@pytest.mark.filterwarnings("ignore::commkit.straggler.ConditioningWarning")
@pytest.mark.parametrize(("name", "n", "args"), SAMPLED, ids=lambda x: str(x).replace(" ", ""))
def test_sampled_patterns_decode_to_the_sum(name: str, n: int, args: tuple[int, ...]) -> None:
    make = {"gc": gradient_coding, "sr_sgc": sr_sgc, "m_sgc": m_sgc}[name]
    for seed in range(3):
        schedule = make(n, *args, num_jobs=10)  # type: ignore[operator]
        rng, trial, stragglers = random.Random(seed), Trial(schedule, seed), 0
        assert schedule.num_rounds is not None
        while schedule.round < schedule.num_rounds:
            late = admissible(schedule, rng, eagerness=(0.2, 0.6, 1.0)[seed])
            stragglers += len(late)
            trial.round(late)
        assert stragglers
        assert sorted(trial.errors) == list(range(10))
        code = schedule.code  # type: ignore[attr-defined]
        is_exact = code is None or code.name != "cyclic_random"
        assert max(trial.errors.values()) <= (1e-9 if is_exact else 1e-6)

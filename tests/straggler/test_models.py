"""The online checks of straggler models against their definitions by windows."""

import random
from collections.abc import Sequence

import pytest

from commkit.straggler import Arbitrary, Bursty, PerRound


def rounds_of(worker: int, window: Sequence[int]) -> list[int]:
    return [r for r, mask in enumerate(window) if mask >> worker & 1]


def is_bursty(pattern: Sequence[int], n: int, model: Bursty) -> bool:
    for start in range(len(pattern)):
        window = pattern[start : start + model.rounds]
        spans = [rounds_of(worker, window) for worker in range(n)]
        if sum(map(bool, spans)) > model.stragglers:
            return False
        if any(rounds and rounds[-1] - rounds[0] + 1 > model.burst for rounds in spans):
            return False
    return True


def is_arbitrary(pattern: Sequence[int], n: int, model: Arbitrary) -> bool:
    for start in range(len(pattern)):
        counts = [len(rounds_of(w, pattern[start : start + model.rounds])) for w in range(n)]
        if sum(map(bool, counts)) > model.stragglers or max(counts) > model.times:
            return False
    return True


def test_online_checks_agree_with_the_definitions() -> None:
    rng, n = random.Random(0), 4
    admitted = {"bursty": 0, "arbitrary": 0}
    for _ in range(3000):
        pattern = [rng.getrandbits(n) & rng.getrandbits(n) for _ in range(rng.randint(1, 7))]
        burst = rng.randint(1, 3)
        bursty = Bursty(burst, burst + rng.randint(0, 3), rng.randint(0, n))
        arbitrary = Arbitrary(rng.randint(0, 3), rng.randint(1, 4), rng.randint(0, n))
        assert bursty.admits(pattern) == is_bursty(pattern, n, bursty), (bursty, pattern)
        assert arbitrary.admits(pattern) == is_arbitrary(pattern, n, arbitrary), (
            arbitrary,
            pattern,
        )
        admitted["bursty"] += bursty.admits(pattern)
        admitted["arbitrary"] += arbitrary.admits(pattern)
    assert all(100 < count < 2900 for count in admitted.values()), admitted


def test_per_round() -> None:
    assert PerRound(2).admits([0b11, 0b1010, 0])
    assert not PerRound(2).admits([0b11, 0b1011])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bursty(3, 2, 1), "rounds=2 must be >= burst=3"),
        (lambda: Bursty(0, 2, 1), "burst=0 must be >= 1"),
        (lambda: Bursty(1, 2, -1), "stragglers=-1 must be >= 0"),
        (lambda: Arbitrary(1, 0, 1), "rounds=0 must be >= 1"),
        (lambda: PerRound(-1), "stragglers=-1"),
    ],
)
def test_bad_numbers_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]

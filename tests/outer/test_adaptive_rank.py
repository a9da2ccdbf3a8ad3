"""The rule for rank and round length: by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from commkit.outer.adaptive_rank import AdaptiveRank, RankSchedule, numerical_rank


def energies(*values: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(values, dtype=torch.float64)}


@pytest.mark.parametrize(
    ("values", "share", "rank"),
    [
        ((95.0, 4.0, 1.0), 0.95, 1),
        ((94.0, 5.0, 1.0), 0.95, 2),
        ((94.0, 5.0, 1.0), 1.0, 3),
        ((1.0, 1.0, 1.0, 1.0), 0.75, 3),
        ((1.0, 0.0, 0.0), 0.95, 1),
        ((0.0, 0.0), 0.95, 0),
        ((), 0.95, 0),
    ],
)
def test_numerical_rank(values: tuple[float, ...], share: float, rank: int) -> None:
    assert numerical_rank(energies(*values), share) == rank


def test_numerical_rank_of_several_matrices() -> None:
    """Rank 1 keeps 50 + 90, rank 2 50 + 90 + 30 + 10 of 200."""
    both = {"a": torch.tensor([50.0, 30.0, 20.0]), "b": torch.tensor([90.0, 10.0])}
    assert numerical_rank(both, 0.7) == 1
    assert numerical_rank(both, 0.9) == 2
    assert numerical_rank(both, 0.91) == 3
    assert numerical_rank({}, 0.9) == 0


def test_rank_and_round_length_by_hand() -> None:
    """r' = 4 five times: ceil(4 * 1.25) = 5 of 16, so H = ceil(100 * 5 / 16) = 32; before that nothing moves."""
    schedule = RankSchedule(AdaptiveRank(probe_every=0), 16, 100)
    flat = energies(1.0, 1.0, 1.0, 1.0)
    for number in range(5):
        assert schedule.plan(number) == (16, 100)
        schedule.observe(flat)
    assert schedule.plan(5) == (5, 32)
    schedule.observe(energies(0.0))  # tells nothing
    assert schedule.plan(6) == (5, 32)
    for _ in range(4):
        schedule.observe(energies(1.0))
    assert schedule.plan(7) == (2, 13)  # mean (4 + 1 + 1 + 1 + 1) / 5 = 1.6
    schedule.observe(energies(*[1.0] * 100))
    assert schedule.plan(8) == (16, 100)  # never above the first


def test_limits() -> None:
    rule = AdaptiveRank(min_rank=3, min_sync_every=40, window=1, probe_every=0)
    schedule = RankSchedule(rule, 16, 100)
    schedule.observe(energies(1.0))
    assert schedule.plan(1) == (3, 40)


def test_probes() -> None:
    """Rank 8 becomes 10 in rounds 20, 40 ..., and what it finds counts."""
    schedule = RankSchedule(AdaptiveRank(window=1, margin=1.0, energy=1.0), 16, 100)
    schedule.observe(energies(*[1.0] * 8))
    assert [schedule.plan(n)[0] for n in (0, 19, 20, 21, 40)] == [8, 8, 10, 8, 10]
    schedule.observe(energies(*[1.0] * 10))
    assert schedule.plan(21) == (10, 63)


def test_state() -> None:
    rule = AdaptiveRank(window=2)
    one, other = RankSchedule(rule, 16, 100), RankSchedule(rule, 16, 100)
    one.observe(energies(1.0, 1.0))
    other.load_state_dict(one.state_dict())
    for schedule in (one, other):
        schedule.observe(energies(1.0))
    assert one.plan(3) == other.plan(3) == (2, 13)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"energy": 0.0}, r"energy=0.0 must be in \(0, 1\]"),
        ({"window": 0}, "window=0 must be >= 1; use 5"),
        ({"margin": 0.9}, "margin=0.9 must be >= 1; use 1.25"),
        ({"min_rank": 0}, "min_rank=0 must be >= 1"),
        ({"min_sync_every": 0}, "min_sync_every=0 must be >= 1"),
        ({"probe_every": -1}, "probe_every=-1 must be >= 0; use 20"),
        ({"probe": 0.5}, "probe=0.5 must be >= 1"),
    ],
)
def test_bad_knobs(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveRank(**knobs)


def test_limits_above_the_start() -> None:
    with pytest.raises(ValueError, match="min_rank=9 is above rank=8"):
        RankSchedule(AdaptiveRank(min_rank=9), 8, 100)
    with pytest.raises(ValueError, match="min_sync_every=9 is above sync_every=8"):
        RankSchedule(AdaptiveRank(min_sync_every=9), 16, 8)

"""Local updates and training with a coordinator keep their promises under random faults, in virtual time."""

from __future__ import annotations

import pytest

from commkit.sim import coordination, processes


@pytest.mark.parametrize("method", processes.METHODS)
def test_rounds_are_survived(method: str) -> None:
    outcomes = [processes.simulate(seed, method) for seed in range(5)]
    assert sum(outcome.ends.get("well", 0) for outcome in outcomes) > 5
    assert max(outcome.epochs for outcome in outcomes) > 1


def test_who_ends_while_its_agent_asks_the_store_is_not_taken_for_lost() -> None:
    """Found by these seeds: its word that it is done was never written."""
    for seed in (265, 286):
        processes.simulate(seed)


@pytest.mark.parametrize("method", coordination.METHODS)
def test_jobs_are_done_without_the_slowest(method: str) -> None:
    outcomes = [coordination.simulate(seed, method) for seed in range(5)]
    assert sum(outcome.end == "well" for outcome in outcomes) > 2
    assert sum(outcome.late for outcome in outcomes) > 5


def test_a_seed_gives_the_same_run_again() -> None:
    for simulate in (processes.simulate, coordination.simulate):
        assert simulate(3) == simulate(3)

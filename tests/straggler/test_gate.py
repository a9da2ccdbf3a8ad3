"""When a round closes, with a clock that the test moves."""

from __future__ import annotations

import math

import pytest

from commkit.straggler import Backup, Coding, DynamicBackup, Method, SelectiveRepetition
from commkit.straggler.gate import Gate


def gate(method: Method, workers: int = 4, grace_s: float = 0.0, start: float = 100.0) -> Gate:
    rounds = method.build(workers)
    rounds.limit(10)
    return Gate(rounds, grace_s, start, set())


def test_first_k_closes_when_k_are_here() -> None:
    it = gate(Backup(num_backups=1))
    for worker, now in ((2, 101.0), (0, 102.0)):
        it.arrive(worker, now)
        assert it.closes_at(now) == math.inf
    it.arrive(3, 105.0)
    assert it.closes_at(105.0) == 105.0
    assert it.late == {1}
    assert it.arrived == {2: 1.0, 0: 2.0, 3: 5.0}


def test_the_grace_time_begins_when_enough_are_here_and_ends_when_all_are() -> None:
    it = gate(Backup(num_backups=2), grace_s=0.5)
    it.arrive(0, 101.0)
    it.arrive(1, 102.0)
    assert it.closes_at(102.0) == 102.5
    it.arrive(2, 102.2)  # late by less than the grace time: it counts, and does not prolong it
    assert it.closes_at(102.2) == 102.5
    it.arrive(3, 102.3)
    assert it.closes_at(102.3) == 102.3
    assert it.late == set()


def test_the_mu_rule_holds_a_round_open_for_those_who_are_nearly_as_fast() -> None:
    it = gate(Coding(num_stragglers=1, mu=1.0))
    it.arrive(0, 101.0)
    it.arrive(1, 101.1)
    assert it.closes_at(101.1) == 102.0  # decodable, but not yet twice the fastest one's time
    it.arrive(2, 101.5)
    assert it.closes_at(101.5) == 102.0
    late = gate(Coding(num_stragglers=1, mu=1.0))
    late.arrive(0, 101.0)
    assert late.closes_at(102.5) == math.inf  # not decodable: however late it is
    late.arrive(1, 107.0)
    assert late.closes_at(107.0) == 107.0


def test_a_schedule_closes_only_on_patterns_that_it_was_made_for() -> None:
    rounds = SelectiveRepetition(burst=1, rounds=2, stragglers=2, mu=0.0).build(4)
    rounds.limit(10)
    first = Gate(rounds, 0.0, 0.0, set())
    first.arrive(0, 1.0)
    first.arrive(1, 1.0)
    assert first.closes_at(1.0) <= 1.0  # workers 2 and 3 may be late
    rounds.plan()
    rounds.close(first.late)
    again = Gate(rounds, 0.0, 10.0, set())
    again.arrive(0, 11.0)
    again.arrive(1, 11.0)
    again.arrive(3, 11.0)
    assert again.closes_at(11.0) == math.inf  # but not worker 2 twice in a row
    again.arrive(2, 15.0)
    assert again.closes_at(15.0) <= 15.0


@pytest.mark.parametrize("how", ["dead", "refused"])
def test_nobody_waits_for_those_who_cannot_come(how: str) -> None:
    it = gate(DynamicBackup(), grace_s=5.0)  # at first it awaits half of four
    it.arrive(0, 101.0)
    assert it.closes_at(101.0) == math.inf
    getattr(it, how).update((1, 2, 3))
    assert it.closes_at(101.0) == 101.0
    assert not it.stuck


@pytest.mark.parametrize("method", [Backup(num_backups=1), Coding(num_stragglers=1)])
def test_it_is_stuck_when_nobody_else_can_come_and_it_is_not_enough(method: Method) -> None:
    it = gate(method)
    it.arrive(0, 101.0)
    it.dead |= {1, 3}
    assert not it.stuck  # worker 2 may come
    it.refused.add(2)
    assert it.stuck
    assert it.closes_at(101.0) == math.inf


def test_it_is_stuck_without_anybody() -> None:
    it = gate(DynamicBackup())
    it.dead |= {0, 1, 2, 3}
    assert it.stuck

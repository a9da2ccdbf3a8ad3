"""Leases, shards and dynamic local updates, by a clock of the test's own; options; the division among servers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from commkit.outer.async_local_sgd import AsyncOptions
from commkit.outer.async_local_sgd.dispatch import Dispatcher
from commkit.outer.async_local_sgd.stats import AsyncStats, PushRecord

OPTIONS = AsyncOptions(sync_every=64, min_steps=5, min_lease_s=1.0, timeout_s=100.0)


def played(
    dispatcher: Dispatcher, speeds: dict[int, float], until: float
) -> list[tuple[float, int, int]]:
    """Workers of constant speed, each with a new task the moment it is done: (when, who, steps)."""
    out = {w: dispatcher.grant(w, 0, 0.0) for w in speeds}
    done: list[tuple[float, int, int]] = []
    while True:
        ends = {w: lease.granted + lease.steps / speeds[w] for w, lease in out.items()}
        worker = min(ends, key=lambda w: (ends[w], w))
        now, lease = ends[worker], out[worker]
        if now > until:
            return done
        dispatcher.measure(lease, lease.steps, now - lease.granted, now)
        dispatcher.settle(lease, lease.steps)
        done.append((now, worker, lease.steps))
        out[worker] = dispatcher.grant(worker, 0, now)


def test_dynamic_tasks_take_all_workers_the_same_time() -> None:
    speeds = {1: 10.0, 2: 10.0, 3: 20.0, 4: 40.0}
    steps = {w: s for _, w, s in played(Dispatcher(OPTIONS, list(speeds)), speeds, 60.0)}
    assert steps == {1: 16, 2: 16, 3: 32, 4: 64}
    durations = {w: steps[w] / speeds[w] for w in speeds}
    assert max(durations.values()) == min(durations.values()) == 1.6


def test_fixed_tasks_do_not() -> None:
    options = dataclasses.replace(OPTIONS, dynamic=False)
    steps = {s for _, _, s in played(Dispatcher(options, [1, 2]), {1: 1.0, 2: 9.0}, 300.0)}
    assert steps == {64}


def test_a_worker_of_no_known_speed_gets_a_short_task_and_a_slow_one_no_less() -> None:
    speeds = {1: 1.0, 2: 1000.0}
    done = played(Dispatcher(OPTIONS, [1, 2]), speeds, 12.0)
    assert [s for _, w, s in done if w == 1] == [5, 5]
    assert [s for _, w, s in done if w == 2][:2] == [5, 64]


def test_the_fastest_of_those_who_are_left_sets_the_pace() -> None:
    dispatcher = Dispatcher(OPTIONS, [1, 2])
    played(dispatcher, {1: 10.0, 2: 40.0}, 20.0)
    assert dispatcher.task_steps(1) == 16
    dispatcher.forget(2)
    assert dispatcher.task_steps(1) == 64


def test_speeds_follow_with_the_weight_of_the_newest() -> None:
    dispatcher = Dispatcher(dataclasses.replace(OPTIONS, speed_ema=0.25), [1])
    for seconds in (5.0, 1.0):
        lease = dispatcher.grant(1, 0, 0.0)
        dispatcher.measure(lease, 5, seconds, 9.0)
        dispatcher.settle(lease, 5)
    assert dispatcher.speeds[1] == 0.75 * 1.0 + 0.25 * 5.0


def test_shards_are_visited_evenly_and_never_by_two_at_once() -> None:
    options = dataclasses.replace(OPTIONS, num_shards=5, dynamic=False, sync_every=2)
    dispatcher = Dispatcher(options, [1, 2, 3])
    steps, leases, seen = [0] * 5, {}, []
    for turn in range(100):
        worker = 1 + turn % 3
        if worker in leases:
            lease = leases.pop(worker)
            dispatcher.settle(lease, lease.steps)
            steps[lease.shard] += lease.steps
        lease = dispatcher.grant(worker, 0, 0.0)
        assert lease.shard not in {other.shard for other in leases.values()}
        assert lease.first_step == steps[lease.shard]
        leases[worker] = lease
        seen.append(lease.shard)
        counts = [seen.count(shard) for shard in range(5)]
        assert max(counts) - min(counts) <= 1
    other = Dispatcher(dataclasses.replace(options, seed=1), [1, 2, 3])
    assert [other.grant(w, 0, 0.0).shard for w in (1, 2, 3)] != seen[:3]  # ties are drawn


def test_a_lease_that_is_given_up_comes_back_first_and_from_where_it_was() -> None:
    dispatcher = Dispatcher(dataclasses.replace(OPTIONS, num_shards=4), [1, 2])
    lost, other = dispatcher.grant(1, 0, 0.0), dispatcher.grant(2, 0, 0.0)
    dispatcher.settle(other, 5)
    dispatcher.give_up(lost)
    again = dispatcher.grant(2, 1, 1.0)
    assert (again.shard, again.first_step) == (lost.shard, lost.first_step)
    assert again.number not in (lost.number, other.number)
    assert lost.number not in dispatcher.leases


def test_leases_last_three_times_what_their_worker_takes() -> None:
    dispatcher = Dispatcher(dataclasses.replace(OPTIONS, dynamic=False, sync_every=10), [1, 2])
    lease = dispatcher.grant(1, 0, 0.0)
    assert lease.deadline == 100.0  # of no known speed: timeout_s
    dispatcher.measure(lease, 10, 1.0, now=4.0)  # with waiting and transfers
    dispatcher.settle(lease, 10)
    lease = dispatcher.grant(1, 0, 10.0)
    assert lease.deadline == 10.0 + 3 * 4.0
    assert dispatcher.expired(21.9) == []
    assert dispatcher.expired(22.0) == [lease]
    quick = dispatcher.grant(2, 0, 0.0)
    dispatcher.measure(quick, 10, 0.01, now=0.01)
    dispatcher.settle(quick, 10)
    assert dispatcher.grant(2, 0, 0.0).deadline == 1.0  # min_lease_s


def test_state_counts_tasks_that_are_out_as_never_given() -> None:
    options = dataclasses.replace(OPTIONS, num_shards=3)
    first, second = Dispatcher(options, [1, 2]), Dispatcher(options, [1, 2])
    done = first.grant(1, 0, 0.0)
    first.settle(done, 5)
    out = first.grant(2, 0, 0.0)
    second.load_state_dict(first.state_dict())
    shards = [second.grant(w, 0, 0.0) for w in (1, 2)]
    assert done.shard not in {lease.shard for lease in shards}
    assert out.number < min(lease.number for lease in shards)
    third = second.state_dict()["steps"]
    assert third[done.shard] == 5
    with pytest.raises(ValueError, match="set num_shards=3"):
        Dispatcher(OPTIONS, [1, 2]).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sync_every": 0}, "sync_every=0"),
        ({"min_steps": 65}, r"min_steps=65 must be from 1 to sync_every=64"),
        ({"speed_ema": 0.0}, "speed_ema=0.0"),
        ({"grace_s": -1.0}, "grace_s=-1.0"),
        ({"lease_factor": 0.5}, "lease_factor=0.5"),
        ({"timeout_s": 0.0}, "timeout_s=0.0"),
        ({"servers": ()}, r"servers=\(\)"),
        ({"servers": (1, 1)}, r"servers=\(1, 1\)"),
    ],
)
def test_bad_options_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(OPTIONS, **change)


def test_roles_that_do_not_fit_the_group_are_refused() -> None:
    assert AsyncOptions(servers=(2, 0)).workers(5) == [1, 3, 4]
    with pytest.raises(ValueError, match="leaves none of 1 ranks"):
        AsyncOptions().workers(1)
    with pytest.raises(ValueError, match=r"servers=\(7,\) must be ranks of a group of 3"):
        AsyncOptions(servers=(7,)).workers(3)
    with pytest.raises(ValueError, match="at least the number of workers, 3"):
        AsyncOptions(num_shards=2).workers(4)


def test_staleness_statistics() -> None:
    stats = AsyncStats()
    assert (stats.mean_staleness, stats.max_staleness) == (0.0, 0)
    for number, staleness in enumerate((0, 2, 1, 2), 1):
        loss = 2.5 if number % 2 else None
        record = PushRecord(number, number, 1, 0, 0, 5, staleness, number, 0.1, loss)
        assert PushRecord.unpack(record.pack()) == record
        stats.count(record)
    assert dict(stats.staleness) == {0: 1, 1: 1, 2: 2}
    assert math.isclose(stats.mean_staleness, 1.25)
    assert (stats.max_staleness, stats.pushes, stats.steps) == (2, 4, 20)

"""Workers are lost in the middle of training, and the others go on as if the step had begun after the loss."""

from __future__ import annotations

import signal
import threading
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from commkit import Elastic
from commkit.comm import CollectiveError
from commkit.membership import ElasticOptions, Place, default_group, hand_over
from commkit.membership.epoch_store import EpochStore

from .crew import Crew
from .training import QUICK, die, digest, loss_of, make_model, train

TOPK = {"name": "topk", "density": 0.1, "min_numel": 0}
SIGN = {"name": "sign", "min_numel": 0}
POWERSGD = {"name": "powersgd", "rank": 2, "min_compression_rate": 0.0}


def dies(rank: int, step: int) -> None:
    if (rank, step) == (1, 3):
        die()


def _fails(rank: int, step: int) -> None:
    if (rank, step) == (1, 3):
        raise ValueError("bad sample")


def stops(rank: int, step: int) -> None:
    if (rank, step) == (1, 3):
        die(signal.SIGSTOP)


def two_die(rank: int, step: int) -> None:
    if rank in (1, 2) and step == 3:
        die()


def _first_dies(rank: int, step: int) -> None:
    if (rank, step) == (0, 3):
        die()


def _reference(lost: set[int], size: int, steps: int, since: int) -> float:
    """Dense training on one device, without ``lost`` workers from step ``since`` on."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        workers = [w for w in range(size) if w not in lost or step < since]
        optimizer.zero_grad()
        for worker in workers:
            (loss_of(model, step, worker) / len(workers)).backward()
        optimizer.step()
    return digest(model)


def _worlds(result: dict[str, Any]) -> list[int]:
    return [world_size for _, world_size, _ in result["log"]]


def _numbers(result: dict[str, Any]) -> list[int]:
    return [number for number, _, _ in result["log"]]


@pytest.mark.parametrize(
    ("what", "lost"),
    [(dies, {1}), (_fails, {1}), (two_die, {1, 2}), (_first_dies, {0})],
    ids=["killed", "exception", "two at once", "the first"],
)
def test_others_go_on_from_the_same_step(what: Any, lost: set[int]) -> None:
    with Crew(train, 4, "ddp", 6, QUICK, what) as crew:
        results = crew.finish(*(rank for rank in range(4) if rank not in lost))
    left = 4 - len(lost)
    for result in results:
        assert _numbers(result) == [0, 1, 2, 3, 4, 5]
        assert _worlds(result) == [4, 4, 4, left, left, left]
        assert result["epoch"] == 2
        assert result["digest"] == results[0]["digest"]
        assert result["digest"] == pytest.approx(_reference(lost, 4, 6, since=3), rel=1e-5)


@pytest.mark.parametrize("scheme", [TOPK, SIGN, POWERSGD, "onebit_adam", "dgc"], ids=str)
def test_any_scheme(scheme: Any) -> None:
    with Crew(train, 3, scheme, 6, QUICK, dies) as crew:
        first, last = crew.finish(0, 2)
    assert first["digest"] == last["digest"]
    assert _worlds(first) == [3, 3, 3, 2, 2, 2]


def test_a_stopped_worker_is_left_out_and_told() -> None:
    with Crew(train, 3, TOPK, 6, QUICK, stops) as crew:
        first, last = crew.finish(0, 2)
        assert first["digest"] == last["digest"]
        assert _worlds(first) == [3, 3, 3, 2, 2, 2]
        crew.signal(1, signal.SIGCONT)
        kind, message = crew.error_of(1)
    assert kind == "WorkerEvicted"
    assert "limit_s=3" in message


def _send_much(place: Place, tell: Any) -> set[int]:
    """To a worker that stops when it has received a part of it."""
    much = torch.zeros(1 << 28, dtype=torch.uint8)
    with Elastic(QUICK, place) as members:
        if members.rank == 0:
            return members.comm.exchange({1: much}, {})
        threading.Timer(0.03, die, [signal.SIGSTOP]).start()
        return members.comm.exchange({}, {0: much})


def test_who_sends_to_a_worker_that_stops_is_woken() -> None:
    """Half written, it is nothing that gloo ends with the connection."""
    with Crew(_send_much, 2) as crew:
        assert crew.finish(0) == [{1}]


def test_a_short_pause_evicts_nobody() -> None:
    with Crew(train, 3, TOPK, 6, QUICK, stops) as crew:
        crew.wait_for(0, 2)
        crew.pause(1.0)
        crew.signal(1, signal.SIGCONT)
        for result in crew.finish(0, 1, 2):
            assert _worlds(result) == [3] * 6
            assert result["epoch"] == 1


def _groups_fail(rank: int) -> None:
    """Some fail more often than others, as they do while workers come and go."""
    make, failures = default_group.make, iter(range(rank))

    def refuse() -> None:
        raise RuntimeError("connection refused")

    def failing(*args: Any) -> Any:
        for _ in failures:
            with suppress(RuntimeError):
                make(EpochStore(HashStore(), refuse), 0, 2)
        return make(*args)

    default_group.make = failing


def test_groups_that_are_not_made_are_made_again() -> None:
    with Crew(train, 3, "ddp", 3, QUICK, None, 0.0, _groups_fail) as crew:
        results = crew.finish(0, 1, 2)
    for result in results:
        assert _worlds(result) == [3, 3, 3]
        assert result["epoch"] == 1
        assert result["digest"] == pytest.approx(_reference(set(), 3, 3, since=3), rel=1e-5)


def test_too_few_workers_stop_cleanly() -> None:
    options = ElasticOptions(min_workers=3, heartbeat_s=0.25, limit_s=3.0)
    with Crew(train, 3, TOPK, 6, options, dies) as crew:
        for rank in (0, 2):
            kind, message = crew.error_of(rank)
            assert kind == "TrainingStopped"
            assert "2 workers are left, fewer than min_workers=3" in message
            assert "after 3 steps" in message


def _fails_again(rank: int, step: int) -> None:
    if (rank, step) == (1, 3):
        raise CollectiveError("shapes differ")


def test_what_fails_again_and_again_stops_training() -> None:
    with Crew(train, 2, TOPK, 6, QUICK, _fails_again) as crew:
        for rank in range(2):
            kind, message = crew.error_of(rank)
            assert kind == "TrainingStopped"
            assert "2 workers tried step 4 max_tries=5 times" in message
            assert "shapes differ" in message


def test_a_worker_that_joins_has_the_others_state() -> None:
    with Crew(train, 2, TOPK, 30, QUICK, None, 0.1) as crew:
        crew.wait_for(0, 3)
        late = crew.start()
        results = crew.finish(0, 1, late)
    assert len({result["digest"] for result in results}) == 1
    assert _worlds(results[0])[-1] == 3
    numbers = _numbers(results[2])
    assert numbers == list(range(numbers[0], 30))
    assert numbers[0] > 3
    assert _numbers(results[0]) == list(range(30))


def dies_while_it_receives(rank: int) -> None:
    if rank == 2:
        hand_over.receive = lambda *_: die()  # type: ignore[assignment]


def dies_while_it_sends(rank: int) -> None:
    send = hand_over.send
    calls: list[None] = []

    def dying(*args: Any) -> None:
        calls.append(None)
        if len(calls) == 2:  # the first is at the start
            die()
        send(*args)

    if rank == 0:
        hand_over.send = dying


def test_a_worker_dies_while_it_joins() -> None:
    with Crew(train, 2, TOPK, 30, QUICK, None, 0.1, dies_while_it_receives) as crew:
        crew.wait_for(0, 3)
        crew.start()
        first, last = crew.finish(0, 1)
    assert first["digest"] == last["digest"]
    assert _numbers(first) == list(range(30))
    assert _worlds(first)[-1] == 2
    assert first["epoch"] == 3


def test_the_source_dies_while_another_joins() -> None:
    with Crew(train, 3, TOPK, 30, QUICK, None, 0.1, dies_while_it_sends) as crew:
        crew.wait_for(0, 3)
        late = crew.start()
        results = crew.finish(1, 2, late)
    assert len({result["digest"] for result in results}) == 1
    assert _worlds(results[0])[-1] == 3
    assert _numbers(results[0]) == list(range(30))


def test_the_store_is_lost() -> None:
    with Crew(train, 2, TOPK, 200, QUICK, None, 0.1) as crew:
        crew.wait_for(0, 3)
        crew.lose_store()
        for rank in range(2):
            kind, message = crew.error_of(rank)
            assert kind == "StoreLost"
            assert "start the job again from a checkpoint" in message

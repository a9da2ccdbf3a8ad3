"""The way to the store is cut or stopped for a while, and the workers are not."""

from __future__ import annotations

import time

from commkit.membership import ElasticOptions

from .crew import Crew
from .relay import Relay
from .training import die, train

NERVOUS = ElasticOptions(min_workers=1, heartbeat_s=0.2, limit_s=2.0, start_s=30.0)
TOPK = {"name": "topk", "density": 0.1, "min_numel": 0}
PAUSE_S = 0.05


class _Ways:
    """A relay for each worker."""

    def __init__(self) -> None:
        self.of: dict[int, Relay] = {}

    def __call__(self, rank: int, port: int) -> int:
        self.of[rank] = Relay(port)
        return self.of[rank].port


def test_nobody_is_left_out_because_the_store_was_stopped() -> None:
    """For longer than the limit, and some hear of its return sooner than others."""
    ways = _Ways()
    with Crew(train, 3, TOPK, 90, NERVOUS, None, PAUSE_S, via=ways) as crew:
        crew.wait_for(0, 3)
        for relay in ways.of.values():
            relay.frozen = True
        crew.pause(1.5 * NERVOUS.limit_s)
        for relay in ways.of.values():
            relay.frozen = False
            crew.pause(0.1)
        results = crew.finish(0, 1, 2)
    assert [result["epoch"] for result in results] == [1, 1, 1]
    assert len({result["digest"] for result in results}) == 1


def test_a_worker_that_does_not_reach_the_store_is_left_out_and_told() -> None:
    """It is cut off one way: what the store says would arrive."""
    ways = _Ways()
    with Crew(train, 3, TOPK, 60, NERVOUS, None, PAUSE_S, via=ways) as crew:
        crew.wait_for(0, 3)
        ways.of[2].frozen_up = True
        crew.pause(1.8 * NERVOUS.limit_s)
        ways.of[2].frozen_up = False
        results = crew.finish(0, 1)
        assert crew.error_of(2)[0] == "WorkerEvicted"
    assert [result["epoch"] for result in results] == [2, 2]
    assert len({result["digest"] for result in results}) == 1


def test_a_store_that_never_answers_again_is_lost() -> None:
    """Its host was stopped, or has no power: no connection is closed."""
    ways = _Ways()
    with Crew(train, 2, TOPK, 400, NERVOUS, None, PAUSE_S, via=ways) as crew:
        crew.wait_for(0, 3)
        for relay in ways.of.values():
            relay.frozen = True
        for rank in range(2):  # before the crew's deadline, long before torch's
            kind, message = crew.error_of(rank)
            assert kind == "StoreLost"
            assert "start the job again from a checkpoint" in message


def _one_dies_and_one_hangs(rank: int, step: int) -> None:
    if (rank, step) == (1, 3):
        die()
    if (rank, step) == (2, 3):
        time.sleep(60)  # its signs of life go on


def test_a_group_that_is_not_made_in_time_is_given_up() -> None:
    options = ElasticOptions(
        heartbeat_s=0.25, limit_s=6.0, start_s=30.0, step_limit_s=3.0, max_tries=2
    )
    with Crew(train, 3, TOPK, 6, options, _one_dies_and_one_hangs) as crew:
        kind, message = crew.error_of(0)
    assert kind == "TrainingStopped"
    assert "tried step 4 max_tries=2 times: a step took longer than step_limit_s=3" in message

"""Ranks by the step: what holds when, what is sent then, and what is refused."""

from __future__ import annotations

import pytest
import torch

from commkit.aggregators import PowerSGD
from commkit.aggregators.rank_schedule import checked, highest, rank_at
from commkit.config import ConfigError
from commkit.registry import spec
from commkit.schemes import make_reducer, powersgd
from commkit.sim import ThreadComm, run_threads

from .inputs import contexts, sample

SCHEDULE = [[0, 6], [2, 1], [5, 3]]
RANKS = [6, 6, 1, 1, 1, 3, 3]


def test_a_rank_holds_from_its_step_on() -> None:
    assert [rank_at(checked(SCHEDULE), step) for step in range(7)] == RANKS
    assert rank_at(4, 10**9) == 4
    assert (highest(checked(SCHEDULE)), highest(4)) == (6, 4)


@pytest.mark.parametrize("iteration", ["two_sided", "alternating"])
def test_what_is_sent_follows_the_schedule(iteration) -> None:
    """And nothing is lost where the rank changes."""

    def body(comm: ThreadComm) -> torch.Tensor:
        reducer = powersgd(SCHEDULE, min_compression_rate=0.0, iteration=iteration)
        totals = torch.zeros(2, 20, 30, dtype=torch.float64)
        for step, rank in enumerate(RANKS):
            before = comm.bytes.payload_bytes
            x = sample((20, 30), 10 * step + comm.rank)
            totals[0] += x
            totals[1] += reducer.reduce({"w": x}, comm)["w"]
            reducer.end_step()
            sides = {"two_sided": 50, "alternating": 20 if step % 2 else 30}
            assert comm.bytes.payload_bytes - before == 8 * rank * sides[iteration]
        return torch.stack([totals[0] - reducer.state_dict()["rank/w"], totals[1]])

    first, second = run_threads(body, 2)
    torch.testing.assert_close((first[0] + second[0]) / 2, first[1], rtol=1e-12, atol=1e-12)


def test_a_schedule_comes_from_yaml_and_goes_into_the_spec() -> None:
    reducer = make_reducer({"name": "powersgd", "rank": SCHEDULE})
    assert reducer.spec()["aggregator"]["rank"] == SCHEDULE
    assert spec(PowerSGD(((0, 6), (2, 1), (5, 3)))) == spec(PowerSGD(SCHEDULE))


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (0, "rank=0 must be >= 1; use"),
        ([], r"\[step, rank\] pairs; use"),
        ([[0, 4], [10]], r"\[step, rank\] pairs; use"),
        ([[5, 4]], "must begin with 0 and increase; use"),
        ([[0, 4], [10, 2], [10, 1]], "must begin with 0 and increase; use"),
        ([[0, 4], [10, 0]], "every rank must be >= 1; use"),
    ],
)
def test_bad_schedules_are_refused(rank, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PowerSGD(rank)
    with pytest.raises(ConfigError, match=words):
        make_reducer({"name": "powersgd", "rank": rank})


def test_an_alternating_iteration_needs_a_warm_start() -> None:
    with pytest.raises(ValueError, match="use warm_start=True, or iteration='two_sided'"):
        PowerSGD(warm_start=False, iteration="alternating")
    with pytest.raises(ValueError, match="'alternate' is unknown; use 'two_sided'"):
        PowerSGD(iteration="alternate")


def test_a_rank_that_no_matrix_has_is_refused() -> None:
    """One that is too large for some is not: those go densely, or at their full rank."""
    xs = [sample((40, 10), 0), sample((6, 7), 1), sample((1000,), 2)]

    def body(comm: ThreadComm) -> None:
        for rank in (10, [[0, 10], [5, 2]]):
            PowerSGD(rank).prepare(contexts(xs), comm)
        for rank in (11, [[0, 2], [5, 11]]):
            with pytest.raises(ValueError, match=r"rank=11 is above .* largest usable rank is 10"):
                PowerSGD(rank).prepare(contexts(xs), comm)
        PowerSGD(100).prepare(contexts(xs[2:]), comm)  # nothing to factorise, nothing to refuse

    run_threads(body, 2)


def test_only_what_will_be_compressed_counts() -> None:
    like = {"big": torch.empty(50, 50), "small": torch.empty(5, 5)}

    def body(comm: ThreadComm) -> None:
        reducer = powersgd(rank=20, start_step=100)
        reducer.prepare(like, comm)
        reducer.policy = type(reducer.policy)(100, 0, exclude=["big"])
        with pytest.raises(ValueError, match="largest usable rank is 5"):
            reducer.prepare(like, comm)

    run_threads(body, 1)

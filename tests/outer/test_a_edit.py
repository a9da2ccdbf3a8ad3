"""Laws of A-EDiT: rounds by the clock, replicas of unequal speed."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch

from commkit.outer.a_edit import AEDiT
from commkit.outer.options import SyncOptions
from commkit.outer.penalty import Penalty
from tests.harness import ThreadComm, run_threads
from tests.outer.deep import Deep, loss_of
from tests.outer.problem import assert_same, weights

Weights = dict[str, torch.Tensor]


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def timed_step(outer: AEDiT, clock: Clock, step: int, seconds: float = 1.0) -> None:
    outer.optimizer.zero_grad()
    loss_of(outer.model, outer.comm.rank, step).backward()
    clock.now += seconds
    outer.optimizer.step()


def simulated(
    comm: ThreadComm, step_seconds: list[float], steps: list[int], **knobs: Any
) -> tuple[list[tuple[int, Weights]], AEDiT]:
    """Each replica's own clock goes on by its ``step_seconds`` in every step. Returns, for every round, the
    steps before it and the anchors after it."""
    model = Deep(0)
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    clock, seen, rounds = Clock(), [], 0
    outer = AEDiT(model, inner, process_group=comm, min_total_steps=0, **knobs)
    outer.clock = clock
    with outer:
        for step in range(steps[comm.rank]):
            timed_step(outer, clock, step, step_seconds[comm.rank])
            if outer.round > rounds:
                rounds = outer.round
                anchors = {n: v.detach().clone() for n, v in outer.anchors.values.items()}
                seen.append((step, anchors))
    return seen, outer


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_fast_replicas_do_more_steps_and_all_agree(share: float) -> None:
    def body(comm: ThreadComm) -> Any:
        return simulated(comm, [1.0, 4.0, 2.0], [40, 10, 20], sync_seconds=10.0, step_share=share)

    results = run_threads(body, 3)
    steps = [[step for step, _ in seen] for seen, _ in results]
    # A round begins after the step in which ten seconds are over, and the next forward pass carries it out.
    assert steps == [[10, 20, 30], [3, 6, 9], [5, 10, 15]]
    for seen, _ in results[1:]:
        for (_, mine), (_, theirs) in zip(results[0][0], seen, strict=True):
            assert_same(mine, theirs)
    final = [weights(outer.model) for _, outer in results]
    for other in final[1:]:
        assert_same(final[0], other)
    assert len({outer.round for _, outer in results}) == 1


def test_nobody_waits_for_a_slow_replica_inside_a_round() -> None:
    """The slow one ends its only step of a round when the others have done all of theirs: were they to wait for it
    before that, nothing would go on."""
    rounds, fast_steps = 3, 10
    done = threading.Semaphore(0)

    def body(comm: ThreadComm) -> tuple[int, int, Weights]:
        model = Deep(0)
        inner = torch.optim.SGD(model.parameters(), lr=0.05)
        clock = Clock()
        outer = AEDiT(model, inner, sync_seconds=10.0, min_total_steps=1, process_group=comm)
        outer.clock = clock
        slow = comm.rank == 1
        with outer:
            for step in range(rounds if slow else rounds * fast_steps):
                inner.zero_grad()
                loss_of(model, comm.rank, step).backward()  # ends the round before
                for _ in range(comm.world_size - 1 if slow else 0):
                    assert done.acquire(timeout=60)
                clock.now += 10.0 if slow else 1.0
                inner.step()
                if not slow and (step + 1) % fast_steps == 0:
                    done.release()
            count = outer.step
        return count, outer.round, weights(model)

    results = run_threads(body, 3)
    assert [steps for steps, _, _ in results] == [30, 3, 30]
    for _, number, state in results:
        assert number == results[0][1] > 0
        assert_same(state, results[0][2])


def test_a_round_of_too_few_steps_is_put_off_everywhere() -> None:
    def body(comm: ThreadComm, least: int) -> int:
        model = Deep(0)
        inner = torch.optim.SGD(model.parameters(), lr=0.05)
        clock = Clock()
        outer = AEDiT(
            model,
            inner,
            sync_seconds=2.0,
            min_total_steps=least,
            process_group=comm,
            options=SyncOptions(final_sync=False),
        )
        outer.clock = clock
        with outer:
            for step in range(13):
                timed_step(outer, clock, step)
        return outer.round // len(outer.units)

    # Two replicas: 4 steps in every two seconds.
    assert run_threads(functools.partial(body, least=4), 2) == [6, 6]
    assert run_threads(functools.partial(body, least=5), 2) == [3, 3]
    assert run_threads(functools.partial(body, least=1000), 2) == [0, 0]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_step_weights_are_renormalised_over_those_that_count(share: float) -> None:
    def body(comm: ThreadComm) -> list[tuple[float, ...]]:
        model = Deep(0)
        inner = torch.optim.SGD(model.parameters(), lr=0.0)
        clock = Clock()
        outer = AEDiT(
            model,
            inner,
            sync_seconds=100.0,
            min_total_steps=0,
            step_share=share,
            penalty=Penalty(weighting="none"),
            process_group=comm,
            options=SyncOptions(final_sync=False),
        )
        outer.clock = clock
        with outer:
            for step in range([6, 2, 2][comm.rank]):
                last = step == [5, 1, 1][comm.rank]
                timed_step(outer, clock, step, 100.0 if last else 0.0)
            if comm.rank == 2:
                with torch.no_grad():
                    model.head.bias.fill_(float("nan"))
            loss_of(model, comm.rank, 0)
            return [roster.weights for roster in outer._rosters]

    rosters = run_threads(body, 3)[0]
    everybody = [(1 - share) / 3 + share * s for s in (0.6, 0.2, 0.2)]
    two = [(1 - share) / 2 + share * s for s in (0.75, 0.25)]
    for weights_of_layer in rosters[:4]:
        assert weights_of_layer == pytest.approx(everybody)
    assert rosters[4] == pytest.approx([*two, 0.0])
    assert rosters[4][2] == 0.0


def test_a_replica_without_data_goes_on_in_rounds_with_weight_0() -> None:
    """What the others agree on is what they would without it, once what it had left is in."""
    told: list[list[float]] = []

    class Told(AEDiT):
        def _decide(self, norms: torch.Tensor, weights: torch.Tensor, steps: torch.Tensor) -> None:
            if self.comm.rank == 0:
                told.append(weights.tolist())
            super()._decide(norms, weights, steps)

    def body(comm: ThreadComm) -> Weights:
        model = Deep(0)
        inner = torch.optim.SGD(model.parameters(), lr=0.05)
        clock = Clock()
        outer = Told(model, inner, sync_seconds=2.0, min_total_steps=0, process_group=comm)
        outer.clock = clock
        with outer:
            for step in range([10, 3][comm.rank]):
                timed_step(outer, clock, step)
        return weights(model)

    one, other = run_threads(body, 2)
    assert_same(one, other)
    assert told == [[1, 1], [1, 1], [1, 0], [1, 0], [1, 0]]


def test_the_clock_starts_after_the_warmup() -> None:
    def body(comm: ThreadComm) -> list[int]:
        model = Deep(0)
        inner = torch.optim.SGD(model.parameters(), lr=0.05)
        clock, seen = Clock(), []
        options = SyncOptions(warmup_steps=5, final_sync=False)
        outer = AEDiT(
            model, inner, sync_seconds=3.0, min_total_steps=0, process_group=comm, options=options
        )
        outer.clock = clock
        with outer:
            for step in range(10):
                timed_step(outer, clock, step)
                seen.append(outer.round)
        return seen

    # Steps 5, 6, 7 are the first three seconds; step 8 carries the round out.
    assert run_threads(body, 2)[0] == [0] * 8 + [5] * 2


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"sync_seconds": 0.0}, "sync_seconds=0.0 must be > 0 and below"),
        ({"sync_seconds": 1800.0}, "below options.timeout_s=1800"),
        ({"min_total_steps": -1}, "min_total_steps=-1 must be >= 0"),
        ({"step_share": 1.5}, r"step_share=1.5 must be in \[0, 1\]"),
    ],
)
def test_bad_knobs(knobs: dict[str, Any], message: str) -> None:
    model = Deep(0)
    with pytest.raises(ValueError, match=message):
        AEDiT(model, torch.optim.SGD(model.parameters(), lr=0.1), **knobs)

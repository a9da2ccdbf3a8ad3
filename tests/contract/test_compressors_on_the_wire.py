"""Compressors behind every aggregator that can carry them: nothing bad gets through unnoticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from commkit.aggregators import AllGather, AllReduce, TwoShot
from commkit.sim import ThreadComm, run_threads
from commkit.types import Aggregator, NonFiniteError

from .compressor_cases import CASES, CompressorCase, ctx_of, sample


def carriers(case: CompressorCase) -> list[tuple[str, Callable[[], Aggregator]]]:
    compressor = case.build()
    found: list[tuple[str, Callable[[], Aggregator]]] = []
    if compressor.wire == "summable":
        found.append(("all_reduce", lambda: AllReduce(compressor)))
    if compressor.fixed_size:
        found.append(("all_gather", lambda: AllGather(compressor)))
        found.append(("two_shot", lambda: TwoShot(compressor, granule=16)))
    return found


PAIRS = [pytest.param(make, id=f"{case}-{name}") for case in CASES for name, make in carriers(case)]


def refused(make: Callable[[], Aggregator], bad: float, world_size: int) -> list[bool]:
    """Whether each rank raised when the last one held ``bad`` in one element of one tensor."""

    def body(comm: ThreadComm) -> bool:
        xs = [sample((7, 30), seed=comm.rank), sample((100,), seed=comm.rank + 9)]
        if comm.rank == world_size - 1:
            xs[1][37] = bad
        try:
            make().aggregate(xs, [ctx_of(x, key=str(i)) for i, x in enumerate(xs)], comm)
        except NonFiniteError:
            return True
        return False

    return run_threads(body, world_size)


@pytest.mark.parametrize("make", PAIRS)
def test_bad_values_on_one_rank_are_refused_by_all(make: Callable[[], Aggregator]) -> None:
    for world_size in (1, 2, 3):
        for bad in (torch.nan, torch.inf, -torch.inf):
            assert refused(make, bad, world_size) == [True] * world_size
    assert refused(make, 0.5, 2) == [False, False]


@pytest.mark.parametrize("make", PAIRS)
def test_aggregators_leave_their_inputs_alone(make: Callable[[], Aggregator]) -> None:
    def body(comm: ThreadComm) -> bool:
        xs = [sample((7, 30), seed=comm.rank), sample((100,), seed=comm.rank + 9)]
        before = [x.clone() for x in xs]
        outcomes = make().aggregate(xs, [ctx_of(x, key=str(i)) for i, x in enumerate(xs)], comm)
        for x, outcome in zip(xs, outcomes, strict=True):
            assert outcome.mean.shape == outcome.sent.shape == x.shape
            assert outcome.num_contributors == comm.world_size
        return all(map(torch.equal, xs, before))

    assert all(run_threads(body, 2))

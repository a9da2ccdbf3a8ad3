"""Clipping before compression: by one coefficient on all ranks, ahead of what feedback has saved up."""

from __future__ import annotations

import math

import pytest
import torch

from commkit.aggregators import AllGather
from commkit.compressors import TopK
from commkit.feedback import EF21, EControl, ErrorFeedback
from commkit.policy import Policy
from commkit.reducer import Reducer
from commkit.schemes import make_reducer
from commkit.sim import ThreadComm
from commkit.types import Feedback

from .inputs import Tensors, on_ranks, residual, sample

LIMIT = 2.0
SCALES = (3.0, 0.01, 1.0)  # of the gradients of each step: clipped, not clipped, clipped


def gradients(rank: int, step: int) -> Tensors:
    """A compressed matrix and a dense vector; ranks differ in size, too."""
    scale = SCALES[step] * (1 + rank)
    return {
        "matrix": sample((20, 10), 10 * step + rank) * scale,
        "vector": sample((7,), 100 + 10 * step + rank) * scale,
    }


def coefficient(world_size: int, step: int) -> float:
    squares = [
        float(x.double().square().sum())
        for rank in range(world_size)
        for x in gradients(rank, step).values()
    ]
    return min(1.0, LIMIT / math.sqrt(sum(squares) / world_size))


def sparse(feedback: Feedback, max_grad_norm: float = 0.0) -> Reducer:
    return Reducer(
        AllGather(TopK(0.1)), feedback, Policy(min_numel=10), max_grad_norm=max_grad_norm
    )


@pytest.mark.parametrize("feedback", [ErrorFeedback, EF21, EControl])
def test_all_ranks_clip_by_the_root_of_the_mean_square(feedback: type[Feedback]) -> None:
    world_size = 3

    def body(reducer: Reducer, comm: ThreadComm) -> list[Tensors]:
        results = []
        for step in range(len(SCALES)):
            own = gradients(comm.rank, step)
            if not reducer.max_grad_norm:
                own = {name: x * coefficient(world_size, step) for name, x in own.items()}
            results.append({k: x.clone() for k, x in reducer.reduce(own, comm).items()})
            reducer.end_step()
        return results

    assert [coefficient(world_size, step) < 1 for step in range(len(SCALES))] == [True, False, True]
    clipped = on_ranks(world_size, lambda: sparse(feedback(), LIMIT), body)
    by_hand = on_ranks(world_size, lambda: sparse(feedback()), body)
    for mine, other in zip(clipped, by_hand, strict=True):
        torch.testing.assert_close(mine, other)


def test_what_feedback_has_saved_up_is_not_cut() -> None:
    """What was sent and the residual are together all clipped gradients, however long messages are."""

    def body(reducer: Reducer, comm: ThreadComm) -> None:
        given = torch.zeros(20, 10)
        sent = torch.zeros(20, 10)
        for _ in range(30):
            own = {"matrix": torch.ones(20, 10)}
            given += own["matrix"] * min(1.0, LIMIT / math.sqrt(200))
            sent += reducer.reduce(own, comm)["matrix"]
            reducer.end_step()
        torch.testing.assert_close(sent + residual(reducer, "matrix"), given)
        # A tenth of the elements has to carry what 10 steps gave, so messages are longer than the limit.
        last = reducer.reduce({"matrix": torch.ones(20, 10)}, comm)["matrix"]
        assert float(last.norm()) > 2 * LIMIT

    on_ranks(1, lambda: sparse(ErrorFeedback(), LIMIT), body)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_left_to_the_finite_check(bad: float) -> None:
    def body(reducer: Reducer, comm: ThreadComm) -> None:
        own = gradients(comm.rank, 0)
        before = own["vector"].clone()
        if comm.rank == 1:
            own["matrix"][3, 3] = bad
        results = reducer.reduce(own, comm)
        assert not bool(results["matrix"].isfinite().all())
        torch.testing.assert_close(results["vector"], comm.all_reduce(before) / comm.world_size)
        assert reducer.end_step().nonfinite
        assert "rank/matrix" not in reducer.state_dict()

    on_ranks(2, lambda: sparse(ErrorFeedback(), LIMIT), body)


@pytest.mark.parametrize("name", ["sign", "topk", "randomk", "powersgd", "ef21", "econtrol"])
def test_schemes_with_feedback_take_the_limit_and_then_want_the_whole_gradient(name: str) -> None:
    reducer = make_reducer({"name": name, "max_grad_norm": 0.5})
    assert reducer.max_grad_norm == 0.5
    assert reducer.whole_step
    assert not make_reducer(name).whole_step
    assert reducer.spec() != make_reducer(name).spec()  # ranks that differ in it are told at attach


@pytest.mark.parametrize("limit", [-1.0, math.nan])
def test_a_limit_below_zero_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match=rf"max_grad_norm={limit} must be >= 0; use 0"):
        sparse(ErrorFeedback(), limit)

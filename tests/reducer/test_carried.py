"""What is not compressed travels in the messages of what is, where there is little of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from commkit.feedback import ErrorFeedback
from commkit.policy import Policy
from commkit.reducer import Reducer
from commkit.schemes import make_reducer
from commkit.sim import ThreadComm

from .inputs import Tensors, on_ranks, residual, sample

SIGN = {"name": "sign", "min_numel": 100}
SMALL = {"bias": (7,), "scale": (), "norm": (3, 5), "nothing": (0,)}


def tensors(rank: int, step: int, dtype: torch.dtype = torch.float32) -> Tensors:
    shapes = {"weight": (30, 40), **SMALL, "other": (200,)}
    return {
        key: sample(shape, 100 * step + 10 * rank + i, dtype)
        for i, (key, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_it_is_the_mean_the_same_on_all_ranks_and_takes_no_collective(
    world_size: int, dtype: torch.dtype
) -> None:
    def body(reducer: Reducer, comm: ThreadComm) -> list[Tensors]:
        outs = []
        for step in range(3):
            named = {k: x.clone() for k, x in tensors(comm.rank, step, dtype).items()}
            outs.append({k: x.clone() for k, x in reducer.reduce(named, comm).items()})
            reducer.end_step()
        assert set(comm.bytes.by_op) <= {"all_to_all"}
        return outs

    ranks = on_ranks(world_size, lambda: make_reducer(SIGN), body)
    for step in range(3):
        for key, shape in SMALL.items():
            inputs = [tensors(rank, step, dtype)[key].double() for rank in range(world_size)]
            mean = torch.stack(inputs).mean(0)
            tolerance = 4 * torch.finfo(dtype).eps
            for outs in ranks:
                assert outs[step][key].shape == shape
                assert outs[step][key].dtype == dtype
                assert torch.equal(outs[step][key], ranks[0][step][key])
                torch.testing.assert_close(
                    outs[step][key].double(), mean, rtol=tolerance, atol=tolerance
                )


def test_what_is_compressed_is_not_changed_by_it() -> None:
    def body(reducer: Reducer, comm: ThreadComm, whole: bool) -> list[Tensors]:
        outs = []
        for step in range(3):
            named = {k: x.clone() for k, x in tensors(comm.rank, step).items()}
            parts = [named]
            if not whole:
                parts = [{k: named[k] for k in named if (k in SMALL) == few} for few in (0, 1)]
            found = {k: x for part in parts for k, x in reducer.reduce(part, comm).items()}
            outs.append({k: x.clone() for k, x in found.items()})
            reducer.end_step()
        assert ("all_reduce" in comm.bytes.by_op) == (not whole)
        return outs

    together, apart = (
        on_ranks(3, lambda: make_reducer(SIGN), lambda r, c, whole=whole: body(r, c, whole))
        for whole in (True, False)
    )
    for first, second in zip(together, apart, strict=True):
        for one, other in zip(first, second, strict=True):
            for key in ("weight", "other"):
                assert torch.equal(one[key], other[key])
            for key in SMALL:
                torch.testing.assert_close(one[key], other[key])


def test_half_precision_does_not_overflow() -> None:
    def body(reducer: Reducer, comm: ThreadComm) -> float:
        named = {"weight": torch.ones(200).half(), "bias": torch.full((3,), 60000.0).half()}
        return float(reducer.reduce(named, comm)["bias"][0])

    assert on_ranks(4, lambda: make_reducer(SIGN), body) == [60000.0] * 4


def test_much_of_it_is_reduced_alone() -> None:
    def body(reducer: Reducer, comm: ThreadComm) -> None:
        named = {"weight": torch.ones(200_000), "table": torch.full((100_000,), float(comm.rank))}
        assert bool((reducer.reduce(named, comm)["table"] == 0.5).all())
        assert comm.bytes.by_op["all_reduce"] > 0

    def make() -> Reducer:
        return Reducer(make_reducer(SIGN).aggregator, policy=Policy(exclude=["table"]))

    on_ranks(2, make, body)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["bias", "weight"])
def test_what_is_not_finite_arrives_and_leaves_no_trace(where: str, bad: float) -> None:
    """In what is compressed it makes all of the reduction dense, and nothing is divided twice."""

    def body(reducer: Reducer, comm: ThreadComm) -> None:
        for step in range(3):
            named = {k: x.clone() for k, x in tensors(comm.rank, step).items()}
            if step == 2 and comm.rank == 1:
                named[where].view(-1)[1] = bad
            before = residual(reducer, "weight") if step else None
            outs = reducer.reduce(named, comm)
            stats = reducer.end_step()
            assert stats.nonfinite == (step == 2)
        assert not bool(outs[where].view(-1)[1].isfinite())
        assert before is not None
        assert torch.equal(residual(reducer, "weight"), before)
        for key in SMALL:
            mean = torch.stack([tensors(rank, 2)[key] for rank in range(2)]).mean(0)
            same = torch.ones(mean.shape, dtype=torch.bool)
            if key == where:
                same.view(-1)[1] = False
            torch.testing.assert_close(outs[key][same], mean[same])

    on_ranks(2, lambda: make_reducer(SIGN), body)


class Now(Policy):
    """Compresses all in the first step, and "weight" alone from then on."""

    def compresses(self, ctx: Any) -> bool:
        return ctx.step == 0 or ctx.key == "weight"

    def releases(self, ctx: Any) -> bool:
        return ctx.step > 0


@pytest.mark.parametrize("fails", [False, True])
def test_a_residual_goes_along_even_if_one_rank_alone_has_some(fails: bool) -> None:
    """Rank 1 has nothing to send of "late" at first, and all ranks have to lay out their messages alike."""

    def body(reducer: Reducer, comm: ThreadComm) -> None:
        total = torch.zeros(200)
        for step in range(2):
            named = {"weight": sample((30, 40), comm.rank), "late": torch.zeros(200)}
            if comm.rank == 0 and step == 0:
                named["late"] = sample((200,), 5)
            if fails and step == 1 and comm.rank == 1:
                named["weight"].view(-1)[3] = torch.nan
            hold = ["late"] if comm.rank == 1 and step == 0 else []
            total += reducer.reduce(named, comm, hold)["late"]
            reducer.end_step()
        held = reducer.feedback.holds("late")
        assert held == (fails and comm.rank == 0)
        left = sum(residual(reducer, "late") for _ in range(held))
        wanted = sample((200,), 5)
        if comm.rank == 0:
            server = reducer.aggregator.server_feedback.state_dict()
            owed = torch.zeros(200)
            for key, value in server.items():
                if key.startswith("late@"):
                    owed[int(key.split("@")[1]) :][: value.numel()] += value
            torch.testing.assert_close(2 * (total + owed) + left, wanted, rtol=1e-5, atol=1e-5)

    def make() -> Reducer:
        made = make_reducer(SIGN)
        return Reducer(made.aggregator, ErrorFeedback(), Now())

    on_ranks(2, make, body)

"""Low rank in few bits: the same bits everywhere, honest contributions, what it costs."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from commkit.aggregators import LowRankQuantized, PowerSGD
from commkit.compressors import BlockQuantize, Cast, NoCompression
from commkit.feedback import ErrorFeedback
from commkit.policy import Policy
from commkit.reducer import Reducer
from commkit.sim import ThreadComm, run_threads
from commkit.types import NonFiniteError

from .inputs import aggregate, contexts, sample

SHAPES = [(30, 20), (7,), (20, 30), (), (8, 4, 3, 3), (30, 20), (0, 3)]
EVERY_WORLD = pytest.mark.parametrize("world_size", [1, 2, 3, 4])


def everything(rank: int = 3, **knobs: Any) -> LowRankQuantized:
    return LowRankQuantized(rank, min_compression_rate=0.0, granule=8, **knobs)


def inputs(world_size: int, dtype: torch.dtype = torch.float64) -> list[list[torch.Tensor]]:
    return [
        [sample(shape, 100 * rank + i, dtype) for i, shape in enumerate(SHAPES)]
        for rank in range(world_size)
    ]


@EVERY_WORLD
@pytest.mark.parametrize("code", [BlockQuantize(4, 64, "nearest"), BlockQuantize(8, 16), Cast()])
def test_the_mean_is_the_mean_of_what_was_sent(world_size: int, code: Any) -> None:
    """Both compressions' losses are in ``sent``, and every rank decodes the same bits."""
    runs = aggregate(lambda: everything(compressor=code), inputs(world_size))
    for i in range(len(SHAPES)):
        sent = sum(outcomes[i].sent for outcomes in runs) / world_size
        for outcomes in runs:
            assert torch.equal(outcomes[i].mean, runs[0][i].mean)
            torch.testing.assert_close(outcomes[i].mean, sent, rtol=1e-9, atol=1e-9)
            assert outcomes[i].num_contributors == world_size


@EVERY_WORLD
def test_without_loss_in_the_code_it_is_powersgd(world_size: int) -> None:
    ranks = inputs(world_size)
    ours = aggregate(lambda: everything(compressor=NoCompression()), ranks)
    theirs = aggregate(lambda: PowerSGD(3, min_compression_rate=0.0), ranks)
    for mine, reference in zip(ours, theirs, strict=True):
        for one, other in zip(mine, reference, strict=True):
            torch.testing.assert_close(one.mean, other.mean, rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(one.sent, other.sent, rtol=1e-8, atol=1e-8)


def test_one_rank_sends_what_is_used() -> None:
    for outcome in aggregate(everything, inputs(1))[0]:
        torch.testing.assert_close(outcome.sent, outcome.mean, rtol=1e-12, atol=1e-12)


@EVERY_WORLD
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_energies_are_squared_singular_values(world_size: int, dtype: torch.dtype) -> None:
    ranks = inputs(world_size, dtype)

    def body(comm: ThreadComm) -> None:
        aggregator = everything()
        xs = ranks[comm.rank]
        outcomes = aggregator.aggregate(xs, contexts(xs), comm)
        assert aggregator.energies == {}  # the step may still be given up
        aggregator.commit(True)
        assert set(aggregator.energies) == {"0", "2", "4", "5"}
        for i, found in aggregator.energies.items():
            mean = outcomes[int(i)].mean.reshape(SHAPES[int(i)][0], -1).double()
            expected = torch.linalg.svdvals(mean)[:3] ** 2
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        aggregator.aggregate(xs, contexts(xs, 1), comm)
        aggregator.commit(False)
        assert aggregator.energies == {}

    run_threads(body, world_size)


@pytest.mark.parametrize("world_size", [1, 3])
def test_conservation_with_error_feedback(world_size: int) -> None:
    """Sum of means + mean residual == mean of all inputs, while the rank changes."""
    steps = 8

    def body(comm: ThreadComm) -> tuple[torch.Tensor, torch.Tensor]:
        aggregator = everything()
        reducer = Reducer(aggregator, ErrorFeedback(), Policy(min_numel=0))
        out, given = torch.zeros(2, 30, 20, dtype=torch.float64)
        for step in range(steps):
            aggregator.rank = [3, 5, 1, 4][step % 4]
            x = sample((30, 20), 10 * step + comm.rank)
            given += x
            out += reducer.reduce({"w": x.clone()}, comm)["w"]
            reducer.end_step()
        return out, given - reducer.feedback.state_dict()["w"]

    runs = run_threads(body, world_size)
    sent = sum(run[1] for run in runs) / world_size
    for out, _ in runs:
        torch.testing.assert_close(out, sent, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_matrix_of_low_rank_is_learnt(world_size: int) -> None:
    """Four bits lose some of it each time; error feedback brings all of it, so the average tends to it."""
    target = sample((30, 2), 1) @ sample((2, 20), 2)
    steps = 60

    def body(comm: ThreadComm) -> None:
        reducer = Reducer(everything(2), ErrorFeedback(), Policy(min_numel=0))
        total = torch.zeros_like(target)
        for _ in range(steps):
            total += reducer.reduce({"w": target.clone()}, comm)["w"]
            reducer.end_step()
        # The whole error is the last residual's mean, over the steps: bounded over 60.
        error = float((total / steps - target).norm() / target.norm())
        assert error < 1 / steps

    run_threads(body, world_size)


@pytest.mark.parametrize("where", ["matrix", "vector"])
def test_a_value_that_is_not_finite_raises_on_every_rank(where: str) -> None:
    def body(comm: ThreadComm) -> bool:
        xs = [sample((30, 20), 1), sample((7,), 2)]
        if comm.rank == 1:
            xs[where == "vector"].view(-1)[3] = float("inf")
        try:
            everything().aggregate(xs, contexts(xs), comm)
        except NonFiniteError:
            return True
        return False

    assert run_threads(body, 3) == [True] * 3


@EVERY_WORLD
def test_bytes(world_size: int) -> None:
    """r (a + b) half bytes and a scale per 64, (W-1)/W of it to owners and back."""
    rows, columns, rank = 256, 512, 4

    def body(comm: ThreadComm) -> int:
        xs = [sample((rows, columns), comm.rank, torch.float32)]
        aggregator = LowRankQuantized(rank, granule=64)
        aggregator.aggregate(xs, contexts(xs), comm)
        return comm.bytes.wire_bytes

    payload = rank * (rows + columns) * (0.5 + 4 / 64)
    for sent in run_threads(body, world_size):
        assert sent == pytest.approx(2 * payload * (world_size - 1) / world_size, rel=0.05)


def test_state_goes_on_bit_for_bit() -> None:
    def body(comm: ThreadComm, stop: int | None) -> torch.Tensor:
        aggregator = everything()
        for step in range(6):
            if step == stop:
                state, aggregator = aggregator.state_dict(), everything()
                aggregator.load_state_dict(state)
            xs = [sample((30, 20), 10 * step + comm.rank)]
            (outcome,) = aggregator.aggregate(xs, contexts(xs, step), comm)
            aggregator.commit(True)
        return outcome.mean

    one, other = (run_threads(functools.partial(body, stop=stop), 2)[0] for stop in (None, 3))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"rank": 0}, "rank=0 must be >= 1"),
        ({"min_compression_rate": -1.0}, "min_compression_rate=-1.0 must be >= 0"),
        ({"granule": 4}, "granule=4 must be >= 8"),
    ],
)
def test_bad_knobs(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRankQuantized(**knobs)


def test_a_rank_above_every_matrix() -> None:
    xs = [sample((30, 20), 0)]

    def body(comm: ThreadComm) -> None:
        everything(21).prepare(contexts(xs), comm)

    with pytest.raises(ValueError, match=r"rank=21 is above .* largest usable rank is 20"):
        run_threads(body, 1)

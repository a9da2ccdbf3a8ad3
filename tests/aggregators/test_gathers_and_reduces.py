"""All-gather and all-reduce of payloads: bit-exact models, and golden runs with error feedback."""

from __future__ import annotations

import pytest
import torch

from commkit.aggregators import AllGather, AllReduce, Noop
from commkit.compressors import BlockQuantize, Cast, NoCompression, RandomK, Sign, Ternary, TopK
from commkit.schemes import topk
from commkit.sim import ThreadComm, run_threads
from commkit.types import Compressor

from .inputs import aggregate, contexts, sample

SHAPES = [(64, 48), (500,), (), (8, 4, 3, 3)]
every_world = pytest.mark.parametrize("world_size", [1, 2, 3])


def inputs(world_size: int) -> list[list[torch.Tensor]]:
    return [
        [sample(shape, 100 * rank + i, torch.float32) for i, shape in enumerate(SHAPES)]
        for rank in range(world_size)
    ]


@every_world
@pytest.mark.parametrize(
    "compressor",
    [BlockQuantize(8), BlockQuantize(4), Sign(), Ternary(), TopK(0.1), TopK(0.1, values="bf16")],
    ids=str,
)
def test_all_gather_is_the_mean_of_what_peers_decode(
    compressor: Compressor, world_size: int
) -> None:
    ranks = inputs(world_size)
    results = aggregate(lambda: AllGather(compressor), ranks)
    for i, ctx in enumerate(contexts(ranks[0])):
        decoded = [
            compressor.decompress(compressor.compress(xs[i], ctx, rank), ctx)
            for rank, xs in enumerate(ranks)
        ]
        mean = sum(x / world_size for x in decoded)  # as a plain all-reduce does it
        for rank in range(world_size):
            assert torch.equal(results[rank][i].sent, decoded[rank])
            assert torch.equal(results[rank][i].mean, mean)


@every_world
@pytest.mark.parametrize(
    "compressor",
    [NoCompression(), Cast("bf16"), Cast("fp16"), RandomK(0.1), RandomK(0.1, unbiased=True)],
    ids=str,
)
def test_all_reduce_adds_up_payloads(compressor: Compressor, world_size: int) -> None:
    """What travels is the payload divided by W; ``sent`` is W times what a peer decodes from it."""
    ranks = inputs(world_size)
    results = aggregate(lambda: AllReduce(compressor), ranks)
    for i, ctx in enumerate(contexts(ranks[0])):
        payloads = [
            tuple(t / world_size for t in compressor.compress(xs[i], ctx, rank))
            for rank, xs in enumerate(ranks)
        ]
        total = payloads[0]
        for other in payloads[1:]:
            total = tuple(a + b for a, b in zip(total, other, strict=True))
        for rank in range(world_size):
            assert torch.equal(results[rank][i].mean, compressor.decompress(total, ctx))
            own = compressor.decompress(payloads[rank], ctx) * world_size
            assert torch.equal(results[rank][i].sent, own)


@every_world
def test_topk_with_feedback_follows_a_float64_model(world_size: int) -> None:
    n, k, steps = 60, 6, 15

    def gradient(rank: int, step: int) -> torch.Tensor:
        return sample((n,), 100 * step + rank)

    def body(comm: ThreadComm) -> list[torch.Tensor]:
        reducer, outs = topk(density=k / n, min_numel=0), []
        for step in range(steps):
            outs.append(reducer.reduce({"w": gradient(comm.rank, step).float()}, comm)["w"])
            reducer.end_step()
        return outs

    residuals = [torch.zeros(n).double() for _ in range(world_size)]
    expected = []
    for step in range(steps):
        mean = torch.zeros(n).double()
        for rank, residual in enumerate(residuals):
            residual += gradient(rank, step).float()
            largest = residual.abs().sort(descending=True).indices[:k]
            mean[largest] += residual[largest] / world_size
            residual[largest] = 0
        expected.append(mean)
    for outs in run_threads(body, world_size):
        for out, mean in zip(outs, expected, strict=True):
            # at most 15 float32 additions of numbers below 20
            torch.testing.assert_close(out.double(), mean, rtol=0, atol=3e-5)


def test_noop_hands_back_the_input() -> None:
    ranks = inputs(2)
    for xs, outcomes in zip(ranks, aggregate(Noop, ranks), strict=True):
        assert all(o.mean is x and o.sent is x for x, o in zip(xs, outcomes, strict=True))
        assert {o.num_contributors for o in outcomes} == {1}


def test_sent_is_made_when_somebody_asks_and_not_kept() -> None:
    """Without feedback nobody asks, and nobody pays; with it, one tensor at a time is in memory."""

    def body(comm: ThreadComm) -> None:
        xs = inputs(2)[comm.rank]
        for outcome in AllGather(Sign()).aggregate(xs, contexts(xs), comm):
            assert not isinstance(outcome._sent, torch.Tensor)
            assert outcome.sent is not outcome.sent
            assert torch.equal(outcome.sent, outcome.sent)

    run_threads(body, 2)

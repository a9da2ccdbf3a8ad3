"""TernGrad: shared scales, exact sums in as few bits as hold them, unbiased up to the clipping."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from commkit.aggregators import TernGrad
from commkit.aggregators.sharding import shards_of
from commkit.aggregators.terngrad import sum_bits
from commkit.comm import DistComm
from commkit.sim import ThreadComm, run_threads
from commkit.types import NonFiniteError

from ..harness import run_ranks
from .inputs import aggregate, contexts, sample

SHAPES = [(64, 48), (2000,), (), (1,), (0,), (8, 4, 3, 3)]
GRANULE = 64
every_world = pytest.mark.parametrize("world_size", [1, 2, 3, 8])


def inputs(world_size: int, dtype: torch.dtype = torch.float32) -> list[list[torch.Tensor]]:
    return [
        [sample(shape, 100 * rank + i, dtype) for i, shape in enumerate(SHAPES)]
        for rank in range(world_size)
    ]


def clamped(x: torch.Tensor, clip: float) -> torch.Tensor:
    limit = clip * x.double().square().mean().sqrt() if clip else torch.inf
    return x.double().clamp(-limit, limit)


@pytest.mark.parametrize(
    ("world_size", "bits"), [(1, 2), (2, 4), (7, 4), (8, 8), (127, 8), (128, 16), (5000, 16)]
)
def test_bits_of_a_sum(world_size: int, bits: int) -> None:
    assert sum_bits(world_size) == bits


@every_world
@pytest.mark.parametrize("clip", [0.0, 2.5])
def test_three_values_of_the_scale_that_all_ranks_share(clip: float, world_size: int) -> None:
    ranks = inputs(world_size)
    rounds = aggregate(lambda: TernGrad(clip, GRANULE), ranks)
    for i in range(len(SHAPES)):
        clips = [clamped(xs[i], clip) for xs in ranks]
        scale = max((float(c.abs().max()) for c in clips if c.numel()), default=0.0)
        for outcomes, xs in zip(rounds, ranks, strict=True):
            sent = outcomes[i].sent
            codes = (sent.double() / scale).round()
            assert bool((codes.abs() <= 1).all())
            # scale and limit are float32
            torch.testing.assert_close(sent.double(), codes * scale, rtol=1e-6, atol=0)
            assert bool((sent * xs[i] >= 0).all())


@every_world
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_mean_is_that_of_what_was_sent_and_the_same_everywhere(world_size, dtype) -> None:
    first, *others = aggregate(lambda: TernGrad(granule=GRANULE), inputs(world_size, dtype))
    for i, outcome in enumerate(first):
        assert all(torch.equal(outcome.mean, other[i].mean) for other in others)
        assert outcome.num_contributors == world_size
        sent = sum(ranks[i].sent.double() for ranks in (first, *others)) / world_size
        eps = torch.finfo(outcome.mean.dtype).eps
        # s / W and its product with a whole number: two roundings
        torch.testing.assert_close(outcome.mean.double(), sent, rtol=2 * eps, atol=0)


def test_sums_of_many_ranks_do_not_wrap() -> None:
    """128 equal codes are more than an int8 holds."""
    ranks = [[torch.tensor([2.0, -2.0, 0.0])] for _ in range(128)]
    for outcomes in aggregate(lambda: TernGrad(0.0, 8), ranks):
        torch.testing.assert_close(outcomes[0].mean, ranks[0][0], rtol=1e-6, atol=0)


@every_world
def test_zero_and_full_scale_are_exact(world_size: int) -> None:
    x = torch.tensor([0.5, -0.5, 0.0]).repeat(100)
    for outcomes in aggregate(lambda: TernGrad(0.0, 8), [[x]] * world_size):
        assert torch.equal(outcomes[0].sent, x)
        torch.testing.assert_close(outcomes[0].mean, x, rtol=2**-22, atol=0)


def test_ranks_draw_independently() -> None:
    """The variance of the mean falls as 1/W: equal gradients are not rounded alike."""
    outcomes = aggregate(lambda: TernGrad(0.0), [[sample((2000,), 0, torch.float32)]] * 2)
    assert not torch.equal(outcomes[0][0].sent, outcomes[1][0].sent)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("clip", [0.0, 1.5])
def test_unbiased_up_to_the_clipping(clip: float, world_size: int) -> None:
    steps, copies = 10, 300
    ranks = [[sample((40,), r, torch.float32).repeat(copies)] for r in range(world_size)]
    clips = torch.stack([clamped(xs[0], clip) for xs in ranks])
    scale = clips.abs().max()

    def body(comm: ThreadComm) -> torch.Tensor:
        aggregator, xs = TernGrad(clip, GRANULE), ranks[comm.rank]
        total = torch.zeros(40 * copies, dtype=torch.float64)
        for step in range(steps):
            total += aggregator.aggregate(xs, contexts(xs, step), comm)[0].mean
        return total.view(copies, 40).mean(0) / steps

    # variance |g| (s - |g|) per rank and draw; 5 standard deviations
    clips = clips[:, :40]
    variance = (clips.abs() * (scale - clips.abs())).clamp(min=0).sum(0) / world_size**2
    slack = 5 * (variance / (steps * copies)).sqrt() + 1e-6 * scale
    assert bool(((run_threads(body, world_size)[0] - clips.mean(0)).abs() <= slack).all())


def test_a_rank_of_zeros_takes_the_others_scale() -> None:
    ranks = [[torch.zeros(100)], [torch.full((100,), 3.0)]]
    first, second = aggregate(lambda: TernGrad(0.0), ranks)
    assert not first[0].sent.any()
    assert bool((second[0].sent == 3).all())
    assert bool((first[0].mean == 1.5).all())


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-30, 1e30, 3e38])
def test_extreme_scales(size: float) -> None:
    """Nothing is divided by a scale that is not there, and no sum is formed before the division by W."""
    x = torch.tensor([1.0, -1.0, 0.0]).repeat(50) * size
    for outcomes in aggregate(lambda: TernGrad(), [[x], [x]]):
        torch.testing.assert_close(outcomes[0].mean, x, rtol=1e-5, atol=2.0**-149)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@every_world
def test_bad_values_on_one_rank_are_refused_by_all_after_one_round(world_size, bad: float) -> None:
    def body(comm: ThreadComm) -> bool:
        xs = [sample((300,), comm.rank, torch.float32), torch.ones(5)]
        if comm.rank == world_size - 1:
            xs[0][7] = bad
        with pytest.raises(NonFiniteError):
            TernGrad().aggregate(xs, contexts(xs), comm)
        return comm.bytes.rounds <= 1

    assert all(run_threads(body, world_size))


def test_a_float64_value_that_no_float32_scale_holds_is_refused() -> None:
    xs = [torch.full((3,), 1e300, dtype=torch.float64)]
    with pytest.raises(NonFiniteError):
        aggregate(lambda: TernGrad(), [xs, xs])


def over_gloo(rank: int, world_size: int) -> list[torch.Tensor]:
    comm, xs = DistComm(dist.group.WORLD), inputs(world_size)[rank]
    return [outcome.mean for outcome in TernGrad().aggregate(xs, contexts(xs), comm)]


def test_processes_and_threads_agree() -> None:
    expected = aggregate(TernGrad, inputs(2))[0]
    for means in run_ranks(over_gloo, 2):
        assert all(torch.equal(a, b.mean) for a, b in zip(means, expected, strict=True))


@pytest.mark.parametrize(("world_size", "bits"), [(2, 4), (3, 4), (8, 8)])
def test_bytes_and_rounds(world_size: int, bits: int) -> None:
    ranks = inputs(world_size)
    shards = [
        s
        for i, ctx in enumerate(contexts(ranks[0]))
        for s in shards_of(i, ctx, world_size, GRANULE)
    ]

    def body(comm: ThreadComm) -> tuple[int, int, int]:
        xs = ranks[comm.rank]
        TernGrad(granule=GRANULE).aggregate(xs, contexts(xs), comm)
        own = [s for s in shards if s.owner == comm.rank]
        declared = 4 * (len(xs) + 1) + sum(-(-s.numel // 4) for s in shards)
        declared += world_size * sum(-(-s.numel * bits // 8) for s in own)
        return comm.bytes.rounds, comm.bytes.payload_bytes, declared

    for rounds, counted, declared in run_threads(body, world_size):
        assert rounds == 3
        # a flag, padded to 8 bytes, in each message
        assert declared <= counted <= declared + 2 * world_size * 8

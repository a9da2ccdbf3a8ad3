"""Two-shot: both stages against a model without messages, honesty of ``sent``, server residuals."""

from __future__ import annotations

import pytest
import torch

from commkit.aggregators import TwoShot
from commkit.aggregators.sharding import shards_of
from commkit.compressors import BlockQuantize, Cast, NoCompression, Sign, Ternary, TopK
from commkit.feedback import ErrorFeedback
from commkit.sim import ThreadComm, run_threads
from commkit.types import Compressor, NonFiniteError

from .inputs import aggregate, contexts, sample

COMPRESSORS = [
    BlockQuantize(8, 32),
    BlockQuantize(4, 16, "nearest"),
    Sign(),
    Ternary(),
    TopK(0.1),
    Cast(),
]
SHAPES = [(64, 48), (2000,), (), (1,), (8, 4, 3, 3), (100,)]
GRANULE = 64

every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
every_world = pytest.mark.parametrize("world_size", [1, 2, 3, 4])


def inputs(world_size: int, dtype: torch.dtype = torch.float32) -> list[list[torch.Tensor]]:
    return [
        [sample(shape, 100 * rank + i, dtype) for i, shape in enumerate(SHAPES)]
        for rank in range(world_size)
    ]


def through(compressor: Compressor, x: torch.Tensor, ctx, salt: int) -> torch.Tensor:
    return compressor.decompress(compressor.compress(x, ctx, salt), ctx)


def expected(compressor: Compressor, ranks: list[list[torch.Tensor]]):
    """(means, what each rank sent), shard by shard and without any communication. Means are taken as a
    plain all-reduce takes them: divided first, added up in rank order."""
    world_size = len(ranks)
    means = [torch.zeros_like(x) for x in ranks[0]]
    sent = [[torch.zeros_like(x) for x in xs] for xs in ranks]
    for i, ctx in enumerate(contexts(ranks[0])):
        for shard in shards_of(i, ctx, world_size, GRANULE):
            part = slice(shard.start, shard.end)
            for rank, xs in enumerate(ranks):
                own = xs[i].reshape(-1)[part]
                sent[rank][i].view(-1)[part] = through(compressor, own, shard.ctx, rank)
            mean = sum(own[i].view(-1)[part] / world_size for own in sent)
            means[i].view(-1)[part] = through(compressor, mean, shard.ctx, ~shard.owner)
    return means, sent


@every_world
@every_compressor
def test_both_stages_bit_for_bit(compressor: Compressor, world_size: int) -> None:
    ranks = inputs(world_size)
    means, sent = expected(compressor, ranks)
    for rank, outcomes in enumerate(aggregate(lambda: TwoShot(compressor, granule=GRANULE), ranks)):
        for i, outcome in enumerate(outcomes):
            assert torch.equal(outcome.mean, means[i]), (rank, i)
            assert torch.equal(outcome.sent, sent[rank][i]), (rank, i)
            assert outcome.num_contributors == world_size


@every_world
def test_a_lossless_code_gives_the_mean(world_size: int) -> None:
    ranks = inputs(world_size, torch.float64)
    for outcomes in aggregate(lambda: TwoShot(NoCompression(), granule=8), ranks):
        for i, outcome in enumerate(outcomes):
            mean = sum(xs[i] for xs in ranks) / world_size
            torch.testing.assert_close(outcome.mean, mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_server_residuals_are_what_the_second_stage_lost(world_size: int) -> None:
    """Over some steps: sum of means + server residual == sum of the means of what was sent."""
    steps = 5

    def body(comm: ThreadComm):
        aggregator = TwoShot(Sign(), ErrorFeedback(), GRANULE)
        means, sent = [], []
        for step in range(steps):
            xs = [sample((3000,), 10 * step + comm.rank)]
            (outcome,) = aggregator.aggregate(xs, contexts(xs, step), comm)
            aggregator.commit(True)
            means.append(outcome.mean)
            sent.append(outcome.sent)
        return sum(means), sum(sent), aggregator.state_dict()

    ranks = run_threads(body, world_size)
    arrived = ranks[0][0].clone()
    owned = torch.zeros(3000)
    for _, _, state in ranks:
        for name, residual in state.items():
            start = int(name.partition("@")[2])
            arrived[start : start + residual.numel()] += residual
            owned[start : start + residual.numel()] += 1
    assert bool((owned == 1).all()), "every element has one server"
    mean_sent = sum(sent for _, sent, _ in ranks) / world_size
    torch.testing.assert_close(arrived, mean_sent, rtol=1e-12, atol=1e-12)


def test_unequal_and_missing_shares() -> None:
    """One short tensor: some ranks serve nothing and still take part."""
    ranks = [[sample((70,), rank, torch.float32)] for rank in range(4)]
    means, _ = expected(Sign(), ranks)
    for outcomes in aggregate(lambda: TwoShot(Sign(), granule=GRANULE), ranks):
        assert torch.equal(outcomes[0].mean, means[0])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_empty_tensor_is_served_by_nobody(world_size: int) -> None:
    ranks = [
        [sample((0,), rank), sample((9,), rank), sample((3, 0), rank)] for rank in range(world_size)
    ]
    for outcomes in aggregate(lambda: TwoShot(Sign()), ranks):
        assert [tuple(o.mean.shape) for o in outcomes] == [(0,), (9,), (3, 0)]
        assert [tuple(o.sent.shape) for o in outcomes] == [(0,), (9,), (3, 0)]


def test_the_server_may_refuse_too() -> None:
    """Each rank's fp16 payload is finite, and so is the mean, but residual and mean together are not."""

    def body(comm: ThreadComm) -> None:
        aggregator = TwoShot(Cast("fp16"), ErrorFeedback(), GRANULE)
        xs = [torch.full((100,), 6e4)]
        shards = shards_of(0, contexts(xs)[0], comm.world_size, GRANULE)
        mine = {s.ctx.key: torch.full((s.numel,), 6e4) for s in shards if s.owner == comm.rank}
        aggregator.load_state_dict({f"shard/{key}": value for key, value in mine.items()})
        with pytest.raises(NonFiniteError):
            aggregator.aggregate(xs, contexts(xs), comm)
        aggregator.commit(False)
        kept = aggregator.server_feedback.state_dict()
        assert all(torch.equal(kept[key], value) for key, value in mine.items())

    run_threads(body, 2)

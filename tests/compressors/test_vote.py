"""Votes: one bit, the majority behind two_shot, and ties that are tossed for."""

from __future__ import annotations

import pytest
import torch

from commkit.aggregators import AllGather, TwoShot
from commkit.compressors import SignVote
from commkit.sim import ThreadComm, run_threads
from commkit.types import Aggregator

from .inputs import ctx_of, sample, transmit


def test_golden_payload() -> None:
    x = torch.tensor([1.0, -1.0, 1e-45, -1e-45, 1e38, -3.0, -3.0, -3.0, 2.0])
    (bits,) = SignVote().compress(x, ctx_of(x))
    assert bits.tolist() == [0b0001_0101, 1]


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1.0, 1e30])
def test_signs_whatever_the_size(size: float) -> None:
    x = sample(4097)
    assert torch.equal(transmit(SignVote(), x * size), torch.sign(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_zeros_are_decided_by_fair_coins(dtype: torch.dtype) -> None:
    n = 20_000
    tosses = [
        transmit(SignVote(), torch.zeros(n, dtype=dtype), salt, step=step)
        for salt, step in ((0, 0), (1, 0), (0, 1))
    ]
    for tossed in tosses:
        assert bool((tossed.abs() == 1).all())
        # 5 standard deviations
        assert tossed.mean().abs() < 5 / n**0.5
    assert not torch.equal(tosses[0], tosses[1])
    assert not torch.equal(tosses[0], tosses[2])


def test_a_negative_zero_is_a_zero() -> None:
    zeros = torch.zeros(1000)
    assert torch.equal(transmit(SignVote(), -zeros), transmit(SignVote(), zeros))


@pytest.mark.parametrize("ranks", [2, 6, 10, 14])
def test_ties_are_exactly_zero(ranks: int) -> None:
    """Tenths added up are not: a tie would be decided by rounding, on the same side each time."""
    x = sample(100)
    ctx = ctx_of(x)
    payloads = [SignVote().compress(x * (-1) ** (i < ranks // 2), ctx, i) for i in range(ranks)]
    assert not SignVote().combine(payloads, ctx).any()


def outcomes(make, ranks: list[torch.Tensor], step: int = 0) -> list[torch.Tensor]:
    def body(comm: ThreadComm) -> torch.Tensor:
        aggregator: Aggregator = make()
        x = ranks[comm.rank]
        return aggregator.aggregate([x], [ctx_of(x, step=step)], comm)[0].mean

    return run_threads(body, len(ranks))


@pytest.mark.parametrize("world_size", [1, 3, 5])
def test_two_shot_is_the_majority(world_size: int) -> None:
    ranks = [sample(3000, seed=rank) for rank in range(world_size)]
    majority = torch.sign(sum(torch.sign(x) for x in ranks))
    for mean in outcomes(lambda: TwoShot(SignVote(), granule=64), ranks):
        assert torch.equal(mean, majority)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ties_fall_the_same_way_on_every_rank_and_either_way_in_time(world_size: int) -> None:
    ranks = [sample(3000) * (-1) ** rank for rank in range(world_size)]
    sums = []
    for step in range(4):
        first, *others = outcomes(lambda: TwoShot(SignVote(), granule=64), ranks, step)
        assert bool((first.abs() == 1).all())
        assert all(torch.equal(first, other) for other in others)
        sums.append(first)
    # 5 standard deviations of fair coins
    assert torch.stack(sums).mean().abs() < 5 / 12_000**0.5


def test_gathered_votes_are_their_mean() -> None:
    ranks = [sample(300, seed=rank) for rank in range(4)]
    expected = sum(torch.sign(x) for x in ranks) / 4
    for mean in outcomes(lambda: AllGather(SignVote()), ranks):
        assert torch.equal(mean, expected)

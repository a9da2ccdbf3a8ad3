"""Bytes: what is counted is what is declared, and what the schemes promise."""

from __future__ import annotations

import pytest
import torch

from commkit.aggregators import AllGather, AllReduce, Hierarchical, PowerSGD, TernGrad, TwoShot
from commkit.aggregators.sharding import Shard, shards_of
from commkit.aggregators.terngrad import sum_bits
from commkit.reducer import Reducer
from commkit.schemes import make_reducer
from commkit.sim import ThreadComm, run_threads
from commkit.types import ByteCounter, TensorCtx

from .scheme_cases import BLOCKS, SHAPES, build, gradients

HEADER = 8  # bytes of the health flag, padded, in each message


def count(make, named, world_size: int) -> list[ByteCounter]:
    """What each rank counted in one reduction."""

    def body(comm: ThreadComm) -> ByteCounter:
        make().reduce({key: x.clone() for key, x in named.items()}, comm)
        return comm.bytes

    return run_threads(body, world_size)


def contexts(reducer: Reducer, named) -> tuple[list[TensorCtx], int]:
    """Contexts of what is compressed, and the bytes of everything else."""
    ctxs = [TensorCtx(k, x.shape, x.dtype, x.device, 0, 0) for k, x in named.items()]
    compressed = [ctx for ctx in ctxs if reducer.policy.compresses(ctx)]
    dense = sum(ctx.numel for ctx in ctxs) - sum(ctx.numel for ctx in compressed)
    return compressed, 4 * dense


def shards_in(ctxs: list[TensorCtx], world_size: int, granule: int) -> list[Shard]:
    return [s for i, ctx in enumerate(ctxs) for s in shards_of(i, ctx, world_size, granule)]


def declared(reducer: Reducer, named, world_size: int) -> tuple[int, int]:
    """(payload bytes of all ranks together, number of messages) of one reduction, from declarations."""
    compressed, dense = contexts(reducer, named)
    aggregator = reducer.aggregator
    if isinstance(aggregator, Hierarchical):  # one rank per node: nothing within it
        aggregator = aggregator.aggregator
    if isinstance(aggregator, PowerSGD):
        numbers = 0
        for ctx in compressed:
            factors = aggregator.factors(ctx.shape)
            sides = 0
            if factors is not None:  # the first alternating step sends one side
                sides = factors[1] + (aggregator.iteration == "two_sided") * factors[0]
            numbers += factors[2] * sides if factors else ctx.numel
        return world_size * (4 * numbers + dense), 0
    if isinstance(aggregator, TernGrad):
        shards = shards_in(compressed, world_size, aggregator.granule)
        codes = sum(-(-s.numel * 2 // 8) + -(-s.numel * sum_bits(world_size) // 8) for s in shards)
        scales = 4 * (len(compressed) + 1)
        return world_size * (codes + scales + dense), 2 * world_size**2
    assert isinstance(aggregator, AllReduce | AllGather | TwoShot)
    size = aggregator.compressor.payload_bytes
    if isinstance(aggregator, TwoShot):
        shards = shards_in(compressed, world_size, aggregator.granule)
        there = world_size * sum(size(s.ctx) for s in shards)
        return 2 * (there + world_size * dense), 2 * world_size**2  # what is dense goes along
    return world_size * (sum(map(size, compressed)) + dense), world_size


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("case", BLOCKS)
def test_counted_bytes_are_the_declared_ones(case: str, world_size: int) -> None:
    named = gradients(0, 0)
    counted = sum(c.payload_bytes for c in count(lambda: build(case), named, world_size))
    payload, messages = declared(build(case), named, world_size)
    padding = (HEADER + HEADER - 1) * messages
    assert payload <= counted <= payload + padding


@pytest.mark.parametrize("case", BLOCKS)
def test_one_rank_alone_sends_nothing(case: str) -> None:
    counted = count(lambda: build(case), gradients(0, 0), 1)[0]
    assert (counted.payload_bytes, counted.wire_bytes, counted.rounds) == (0, 0, 0)


@pytest.mark.parametrize(
    ("block", "world_size", "factor"),
    [
        ({"name": "sign"}, 2, 26),
        ({"name": "sign"}, 4, 26),
        ({"name": "topk", "density": 0.001}, 2, 120),
        ({"name": "int8"}, 2, 3.8),
        ({"name": "int8"}, 4, 3.8),
        ({"name": "int4"}, 2, 7.3),
        ({"name": "dynamic8"}, 3, 3.8),
        ({"name": "natural"}, 3, 3.9),
        ({"name": "qsgd"}, 2, 7.7),
        ({"name": "qsgd", "bits": 2}, 4, 15),
        ({"name": "terngrad"}, 2, 10.6),
        ({"name": "terngrad"}, 4, 10.6),
        ({"name": "signsgd_vote"}, 2, 31),
        ({"name": "signsgd_vote"}, 4, 31),
        ({"name": "bf16"}, 3, 1.99),
        ({"name": "randomk", "density": 0.01}, 3, 99),
        ({"name": "powersgd", "rank": 4}, 2, 56),
    ],
    ids=str,
)
def test_wire_bytes_against_a_float32_all_reduce(block, world_size: int, factor: float) -> None:
    named = {"weight": torch.ones(512, 512), "other": torch.ones(256, 1024)}
    dense, compressed = (
        max(c.wire_bytes for c in count(lambda b=b: make_reducer(b), named, world_size))
        for b in ({"name": "ddp"}, block)
    )
    assert dense == 2 * (world_size - 1) * 4 * 2**19 // world_size
    assert compressed * factor <= dense


@pytest.mark.parametrize(
    ("case", "rounds"),
    [
        ("ddp", 1),
        ("bf16", 1),
        ("randomk-all", 1),
        ("topk-all", 1),
        ("sign-gathered", 1),
        ("sign-all", 2),
        ("int8-all", 2),
        ("qsgd-all", 2),
        ("signsgd_vote", 2),
        ("terngrad-all", 3),
        ("powersgd", 2),
        ("powersgd-alternating", 1),
    ],
)
def test_rounds_do_not_grow_with_the_number_of_tensors(case: str, rounds: int) -> None:
    for counted in count(lambda: build(case), gradients(0, 0), 2):
        assert counted.rounds == rounds
        assert sum(counted.by_op.values()) == counted.wire_bytes


@pytest.mark.parametrize("case", BLOCKS)
def test_nothing_is_sent_for_nothing(case: str) -> None:
    for named in ({}, {"empty": torch.zeros(0)}):
        assert all(c.rounds == 0 for c in count(lambda: build(case), named, 2))


def test_dense_tensors_share_one_all_reduce() -> None:
    named = gradients(0, 0)
    assert len(named) == len(SHAPES)
    assert [c.rounds for c in count(lambda: make_reducer("ddp"), named, 2)] == [1, 1]

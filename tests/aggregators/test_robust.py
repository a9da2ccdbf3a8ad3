"""The robust aggregator on ranks: the rules on what peers decode, agreement, and what faults do not do."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from commkit import registry
from commkit.aggregators import AllGather, Robust
from commkit.aggregators.robust_rules import Rule, decide
from commkit.compressors import BlockQuantize, Cast, NoCompression, Sign, SignVote, TopK
from commkit.config import build
from commkit.feedback import ErrorFeedback
from commkit.policy import Policy
from commkit.reducer import Reducer
from commkit.sim import ThreadComm, run_threads
from commkit.types import Compressor, NonFiniteError

from .inputs import aggregate, contexts, sample

SHAPES = [(20, 15), (77,), (), (0,)]
AGREED: tuple[Rule, ...] = ("median", "trimmed_mean", "krum", "multi_krum", "norm_clip")
# The last one decodes NaN to a sign: only its sender's flag says so.
COMPRESSORS = [NoCompression(), Cast("bf16"), BlockQuantize(8), Sign(), TopK(0.2), SignVote()]


def inputs(world_size: int) -> list[list[torch.Tensor]]:
    return [
        [sample(shape, 100 * rank + i, torch.float32) for i, shape in enumerate(SHAPES)]
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
@pytest.mark.parametrize("rule", AGREED)
def test_it_is_the_rule_on_what_peers_decode(rule: Rule, compressor: Compressor) -> None:
    world_size = 5
    ranks = inputs(world_size)
    results = aggregate(lambda: Robust(compressor, rule, 1), ranks)
    stacks = [
        torch.stack(
            [
                compressor.decompress(compressor.compress(xs[i], ctx, rank), ctx)
                for rank, xs in enumerate(ranks)
            ]
        )
        for i, ctx in enumerate(contexts(ranks[0]))
    ]
    verdict = decide([lambda s=s: s for s in stacks], rule, 1)
    for rank, outcomes in enumerate(results):
        for stack, outcome in zip(stacks, outcomes, strict=True):
            assert torch.equal(outcome.mean, verdict.combine(stack))
            assert torch.equal(outcome.sent, stack[rank])
            assert outcome.num_contributors == len(verdict.members)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("rule", ["mean", "trimmed_mean", "norm_clip", "nearest"])
def test_without_faults_it_is_the_all_gather(rule: Rule, world_size: int) -> None:
    ranks = inputs(world_size)
    plain = aggregate(lambda: AllGather(BlockQuantize(8)), ranks)
    robust = aggregate(lambda: Robust(BlockQuantize(8), rule, 0), ranks)
    for ours, theirs in zip(robust, plain, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.mean, b.mean)
            assert torch.equal(a.sent, b.sent)
            assert a.num_contributors == b.num_contributors


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
@pytest.mark.parametrize("rule", AGREED)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_peer_that_is_not_finite_is_left_out(
    rule: Rule, compressor: Compressor, bad: float
) -> None:
    """Whether or not its code can say NaN; and the others go on as if it had not been there."""
    ranks = inputs(6)
    ranks[5][1][5] = bad  # the last, so that nobody rounds with another rank's noise
    results = aggregate(lambda: Robust(compressor, rule, 1), ranks)
    alone = aggregate(lambda: Robust(compressor, rule, 0), ranks[:5])
    for outcomes in results:
        for ours, theirs in zip(outcomes, alone[0], strict=True):
            assert torch.equal(ours.mean, theirs.mean)
            assert ours.num_contributors == theirs.num_contributors


def test_an_overflow_that_all_have_is_seen_by_all() -> None:
    ranks = inputs(5)
    for xs in ranks[:2]:
        xs[0][0] = math.inf

    def body(comm: ThreadComm) -> None:
        xs = ranks[comm.rank]
        with pytest.raises(NonFiniteError, match="2 of 5 ranks hold inf or NaN but num_faulty=1"):
            Robust(NoCompression(), "median", 1).aggregate(xs, contexts(xs), comm)

    run_threads(body, 5)


def test_nearest_keeps_to_its_own() -> None:
    """Two camps: each rank averages with the two of its kind."""
    ranks = [[torch.full((4,), float(10 * (r // 3) + r))] for r in range(7)]
    with pytest.warns(UserWarning, match=r"below 5f \+ 1"):
        results = aggregate(lambda: Robust(NoCompression(), "nearest", 2), ranks)
    for rank, (outcome,) in enumerate(results):
        members = decide([lambda: torch.stack([xs[0] for xs in ranks])], "nearest", 2, rank).members
        assert rank in members
        assert torch.equal(outcome.mean, sum(ranks[i][0] / 5 for i in members))
    assert not torch.equal(results[0][0].mean, results[6][0].mean)


def test_through_the_reducer_the_step_is_not_skipped() -> None:
    def body(comm: ThreadComm) -> tuple[torch.Tensor, bool, int]:
        reducer = Reducer(Robust(Cast("bf16"), "trimmed_mean", 1), policy=Policy(min_numel=0))
        x = sample((50,), comm.rank, torch.bfloat16)
        if comm.rank == 1:
            x[0] = math.nan
        out = reducer.reduce({"w": x}, comm)["w"]
        stats = reducer.end_step()
        return out, reducer.skipped, stats.num_contributors

    results = run_threads(body, 4)
    for out, skipped, contributors in results:
        assert bool(out.isfinite().all())
        assert torch.equal(out, results[0][0])
        assert not skipped
        assert contributors == 3


def test_bytes_are_those_of_an_all_gather() -> None:
    def body(comm: ThreadComm) -> tuple[int, int]:
        xs = inputs(4)[comm.rank]
        Robust(Sign(), "median", 1).aggregate(xs, contexts(xs), comm)
        return comm.bytes.rounds, comm.bytes.wire_bytes

    declared = sum(Sign().payload_bytes(ctx) for ctx in contexts(inputs(1)[0]))
    for rounds, wire_bytes in run_threads(body, 4):
        assert rounds == 1
        assert 0 <= wire_bytes - 3 * declared <= 3 * 16  # a flag byte and padding


def test_what_it_refuses() -> None:
    with pytest.raises(TypeError, match="ErrorFeedback diverges on Robust"):
        Reducer(Robust(Sign(), "median", 1), ErrorFeedback())
    with pytest.raises(ValueError, match="num_faulty=-1 must be >= 0; use"):
        Robust(Sign(), "median", -1)

    def body(comm: ThreadComm) -> None:
        xs = inputs(4)[comm.rank]
        for call in (
            lambda a: a.prepare(contexts(xs), comm),
            lambda a: a.aggregate(xs, contexts(xs), comm),
        ):
            with pytest.raises(ValueError, match="rule=krum with num_faulty=1 needs at least 2f"):
                call(Robust(Sign(), "krum", 1))

    run_threads(body, 4)


def test_yaml_builds_it() -> None:
    block = {"name": "robust", "compressor": "sign", "rule": "multi_krum", "num_faulty": 2}
    built = build("aggregator", block, "aggregator")
    assert built == Robust(Sign(), "multi_krum", 2)
    assert build("aggregator", registry.spec(built), "again") == built
    with pytest.raises(ValueError, match=r"aggregator\.rule='best'"):
        build("aggregator", {**block, "rule": "best"}, "aggregator")
    assert set(get_args(Rule)) == {*AGREED, "mean", "nearest"}

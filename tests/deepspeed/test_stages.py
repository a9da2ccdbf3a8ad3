"""The same scheme, model and data at every ZeRO stage, through DDP, and through DeepSpeed without commkit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from ..adapters import problem
from ..named_schemes import REDUCERS
from . import world

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.timeout(300)
STEPS = range(5)
STAGES = (0, 1, 2, 3)


def _adam(net: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)


def _through_ddp(rank: int, scheme: Any) -> tuple[list[float], torch.Tensor]:
    import commkit

    net = DistributedDataParallel(problem.model())
    handle = commkit.attach(net, scheme)
    losses = problem.train(net, STEPS, rank, optimizer=_adam(net))
    handle.close()
    return losses, problem.parameters(net)


def _through_deepspeed(
    rank: int, scheme: Any, stage: int, accumulate: int = 1, **changes: Any
) -> tuple[list[float], torch.Tensor, Any]:
    net = problem.model()
    block = {} if scheme is None else {"commkit": {"scheme": scheme}}
    config = world.config(stage, gradient_accumulation_steps=accumulate, **block, **changes)
    engine = world.engine_of(net, config, _adam(net))
    losses = world.train(engine, STEPS, rank, accumulate)
    return losses, world.weights(engine), engine


SCHEMES: tuple[Any, ...] = ("ddp", "int8", "sign", {"name": "powersgd", "rank": 2}, "topk")


def against_ddp(rank: int) -> dict[str, bool]:
    """One reduction a step, on the same gradients: the same bits, in buckets of any size."""
    same = {}
    for scheme in SCHEMES:
        losses, weights = _through_ddp(rank, scheme)
        for stage in STAGES:
            zero = {"reduce_bucket_size": 7000} if stage else {}
            mine, reached, _ = _through_deepspeed(rank, scheme, stage, zero_optimization=zero)
            same[f"{scheme} at stage {stage}"] = mine == losses and torch.equal(reached, weights)
    return same


def every_reducer_against_ddp(rank: int) -> dict[str, bool]:
    """All that the library has, where DeepSpeed cuts gradients into buckets of its own."""
    # Replicas of noop differ, and ZeRO makes one model of them.
    blocks: list[Any] = [name for name in REDUCERS if name != "noop"]
    blocks.append({"name": "hierarchical", "scheme": "sign", "local_size": 1})
    same = {}
    for block in blocks:
        losses, weights = _through_ddp(rank, block)
        zero = {"reduce_bucket_size": 7000}
        mine, reached, _ = _through_deepspeed(rank, block, 2, zero_optimization=zero)
        same[str(block)] = mine == losses and torch.equal(reached, weights)
    return same


def accumulated(rank: int) -> dict[str, bool]:
    """Below stage 2, and in DeepSpeed's own context for it, gradients of several micro-batches are added up before
    they are compressed."""
    import commkit

    net = DistributedDataParallel(problem.model())
    handle, optimizer, losses = commkit.attach(net, "sign"), _adam(net), []
    for step in STEPS:
        optimizer.zero_grad()
        with net.no_sync():
            first = problem.loss_of(net, 2 * step, rank)
            (first / 2).backward()
        second = problem.loss_of(net, 2 * step + 1, rank)
        (second / 2).backward()
        optimizer.step()
        losses += [first.item(), second.item()]
    handle.close()
    same = {}
    for stage, zero in ((0, {}), (1, {}), (1, {"overlap_comm": True})):
        mine, *_ = _through_deepspeed(rank, "sign", stage, 2, zero_optimization=zero)
        same[f"stage {stage} {zero}"] = mine == losses
    for stage in (2, 3):
        net, mine = problem.model(), []
        engine = world.engine_of(net, world.config(stage, commkit={"scheme": "sign"}), _adam(net))
        for step in STEPS:
            with engine.coalesce_grad_reduction():
                for micro in range(2):
                    loss = world.loss_of(engine, 2 * step + micro, rank)
                    engine.backward(loss / 2)
                    mine.append(loss.item())
            engine.step()
        same[f"coalesced at stage {stage}"] = mine == losses
    return same


def norms_of_whole_gradients(rank: int) -> dict[str, bool]:
    """A scheme that must see all gradients at once gets them, however small the buckets were meant to be."""
    scheme = {"name": "powersgd", "rank": 2, "max_grad_norm": 0.05}
    losses, weights = _through_ddp(rank, scheme)
    same = {}
    for stage in STAGES:
        zero = {"reduce_bucket_size": 7000} if stage else {}
        mine, reached, _ = _through_deepspeed(rank, scheme, stage, zero_optimization=zero)
        same[f"stage {stage}"] = mine == losses and torch.equal(reached, weights)
    return same


def against_deepspeed(rank: int) -> dict[str, bool]:
    """Accumulation, clipping and bf16 are DeepSpeed's own: without compression nothing differs from it."""
    same = {}
    for precision in ({}, {"bf16": {"enabled": True}}):
        for stage in STAGES:
            options: dict[str, Any] = {"gradient_clipping": 0.05, **precision}
            losses, weights, _ = _through_deepspeed(rank, None, stage, 2, **options)
            mine, reached, engine = _through_deepspeed(rank, "ddp", stage, 2, **options)
            same[f"stage {stage} {precision}"] = mine == losses and torch.equal(reached, weights)
            engine.commkit.close()
    return same


def passes_and_bytes(rank: int) -> dict[int, tuple[int, int, int]]:
    """With two micro-batches: reductions behind us, and payload against dense bytes of the last step."""
    told = {}
    for stage in STAGES:
        _, _, engine = _through_deepspeed(rank, "sign", stage, 2)
        stats = engine.commkit.last_step
        told[stage] = (engine.commkit.reducer.step, stats.payload_bytes, stats.dense_bytes)
    return told


def after_close(rank: int) -> dict[int, bool]:
    """DeepSpeed averages by itself again, and the model can be attached to anew."""
    same = {}
    for stage in STAGES:
        losses, _, _ = _through_deepspeed(rank, None, stage)
        net = problem.model()
        engine = world.engine_of(net, world.config(stage, commkit={"scheme": "noop"}), _adam(net))
        engine.commkit.close()
        same[stage] = world.train(engine, STEPS, rank) == losses
    return same


def attached_by_hand(rank: int) -> bool:
    """An engine that somebody else has built."""
    import deepspeed

    import commkit.deepspeed

    losses, _ = _through_ddp(rank, "sign")
    net = problem.model()
    engine, *_ = deepspeed.initialize(
        model=net,
        optimizer=_adam(net),
        config=world.config(2, zero_optimization={"reduce_scatter": False}),
    )
    commkit.deepspeed.attach(engine, "sign")
    return world.train(engine, STEPS, rank) == losses


@pytest.fixture(scope="module")
def outcomes() -> world.Outcomes:
    return world.Outcomes(
        2,
        against_ddp,
        every_reducer_against_ddp,
        accumulated,
        norms_of_whole_gradients,
        against_deepspeed,
        passes_and_bytes,
        after_close,
        attached_by_hand,
    )


@pytest.mark.parametrize(
    "case",
    [
        against_ddp,
        every_reducer_against_ddp,
        accumulated,
        norms_of_whole_gradients,
        against_deepspeed,
        after_close,
    ],
)
def test_the_same_bits(outcomes, case):
    for same in outcomes.of(case):
        assert not [name for name, equal in same.items() if not equal]


def test_an_engine_of_somebody_else(outcomes):
    assert outcomes.of(attached_by_hand) == [True, True]


def test_one_pass_per_step_below_stage_2_and_one_per_backward_from_there_on(outcomes):
    size = problem.parameters(problem.model()).numel() * 4
    for told in outcomes.of(passes_and_bytes):
        assert {stage: step for stage, (step, *_) in told.items()} == {0: 5, 1: 5, 2: 10, 3: 10}
        assert {stage: dense for stage, (_, _, dense) in told.items()} == {
            0: size,
            1: size,
            2: 2 * size,
            3: 2 * size,
        }
        assert all(payload < dense / 4 for _, payload, dense in told.values())

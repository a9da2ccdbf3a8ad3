"""FSDP1: its hook on flat gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

import commkit

from ..harness import run_ranks
from .models import loss_of, make


def wrapped(strategy: str, width: int = 32, **options: object) -> FullyShardedDataParallel:
    model = make(width=width)
    options = {
        "sharding_strategy": ShardingStrategy[strategy],
        "device_id": torch.device("cpu"),
        "use_orig_params": True,
    } | options
    for at, block in enumerate(model.blocks):
        model.blocks[at] = FullyShardedDataParallel(block, **options)
    return FullyShardedDataParallel(model, **options)


def train(rank, world_size, strategy, scheme, knobs, steps):
    model = wrapped(strategy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    handle = commkit.attach(model, scheme, **knobs) if scheme else None
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, step, rank)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    with FullyShardedDataParallel.summon_full_params(model):
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return losses, weights, handle and handle.last_step


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP"])
def test_compressed_scatters_follow_fsdp(strategy):
    plain = run_ranks(train, 2, strategy, None, {}, 15)
    ours = run_ranks(train, 2, strategy, "qsdp", {"weight_bits": 32}, 15)
    before, exact, close = plain[0][0][0], plain[0][0][-1], ours[0][0][-1]
    assert close != exact
    assert abs(close - exact) < 0.05 * (before - exact)
    stats = ours[0][2]
    assert 0 < stats.wire_bytes < stats.dense_bytes / 2 / 3.8  # a rank sends half of what it has


@pytest.mark.parametrize("scheme", ["ddp", "int8", "fp16"])
def test_no_shard_takes_schemes_without_state(scheme):
    plain = run_ranks(train, 2, "NO_SHARD", None, {}, 15)
    ours = run_ranks(train, 2, "NO_SHARD", scheme, {}, 15)
    before, exact, close = plain[0][0][0], plain[0][0][-1], ours[0][0][-1]
    assert abs(close - exact) < 0.05 * (before - exact)
    assert all(torch.equal(ours[0][1][n], ours[1][1][n]) for n in ours[0][1])


def refused(rank, world_size, strategy, scheme, knobs):
    mesh = None
    if strategy == "HYBRID_SHARD":
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, world_size // 2))
    model = wrapped(strategy, **({"device_mesh": mesh} if mesh is not None else {}))
    try:
        commkit.attach(model, scheme, **copy.copy(knobs))
    except Exception as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("strategy", "scheme", "knobs", "says"),
    [
        ("HYBRID_SHARD", "qsdp", {"weight_bits": 32}, "use FSDP2"),
        ("FULL_SHARD", "qsdp", {}, "weight_bits=32"),
        ("FULL_SHARD", "int8", {}, "qsdp"),
        ("FULL_SHARD", "qsdp", {"weight_bits": 32, "gradient_bits": 32}, "nothing to do"),
        ("NO_SHARD", "qsdp", {"weight_bits": 32}, "NO_SHARD"),
        ("NO_SHARD", "sign", {}, "DistributedDataParallel"),
    ],
)
def test_what_cannot_work_is_refused(strategy, scheme, knobs, says):
    for text in run_ranks(refused, 2 if strategy != "HYBRID_SHARD" else 4, strategy, scheme, knobs):
        assert says in text

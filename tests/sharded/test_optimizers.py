"""Optimizers that communicate, over shards: each rank keeps and exchanges what belongs to its shards."""

from __future__ import annotations

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import commkit
from commkit import checkpoint
from commkit.optim import DGCSGD, DeMo, OneBitAdam, OneBitLamb, ZeroOneAdam

from ..harness import run_ranks
from .models import grid, loss_of, make, shard, whole
from .together import run_each

pytestmark = pytest.mark.timeout(300)
KINDS = {
    "onebit_adam": (OneBitAdam, {"lr": 1e-2, "freeze_step": 5, "min_numel": 64}),
    "onebit_lamb": (OneBitLamb, {"lr": 1e-2, "freeze_step": 5, "min_numel": 64}),
    "zero_one_adam": (ZeroOneAdam, {"lr": 1e-2, "var_freeze_step": 6, "local_step_clipper": 2}),
    "dgc": (DGCSGD, {"lr": 0.05, "density": 0.05, "min_numel": 64, "weight_decay": 1e-3}),
    "demo": (DeMo, {"lr": 3e-3, "top_k": 64, "min_numel": 64}),
}


def build(world_size, kind, knobs, shards):
    cls, settings = KINDS[kind]
    model = make()
    trained = [p for p in model.parameters() if p.requires_grad]
    if shards:
        mesh = grid(world_size // shards, shards)
        shard(model, mesh["shard"])
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = cls(trained, **settings | knobs)
        return model, optimizer, commkit.attach(model, optimizer, mesh=mesh)
    optimizer = cls(trained, **settings | knobs)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    return ddp, optimizer, commkit.attach(ddp, optimizer)


def data_of(rank, world_size, shards):
    """What the ranks of one replica see together is what one rank of DDP sees."""
    return [rank] if shards else [2 * rank, 2 * rank + 1]


def train(rank, world_size, kind, knobs, shards, steps, directory=None, load=False):
    model, optimizer, handle = build(world_size, kind, knobs, shards)
    contents = {
        "replicated": {"model": getattr(model, "module", model), "optimizer": optimizer},
        "per_rank": {},
        "reducer": handle.reducer,
        "comm": handle.comm,
    }
    if load:
        checkpoint.load(directory, **contents)
    losses = []
    for step in steps:
        optimizer.zero_grad()
        seen = data_of(rank, world_size, shards)
        loss = sum(loss_of(model, step, r) for r in seen) / len(seen)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        if directory is not None and not load and step == 8:
            checkpoint.save(directory, **contents)
    handle.close()
    return losses, {n: whole(p) for n, p in getattr(model, "module", model).named_parameters()}


def told_of(kind, function, world_size, case_of, kinds=tuple(KINDS)):
    """The results of ``kind`` among those of all ``kinds``."""
    return run_each(function, world_size, [case_of(each) for each in kinds])[kinds.index(kind)]


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_of_shards_train_and_stay_equal(kind):
    told = told_of(kind, train, 4, lambda kind: (kind, {}, 2, range(24)))
    first, last = (sum(losses[at] for losses, _ in told) for at in (0, -1))
    assert last < 0.8 * first
    for _, weights in told:
        assert all(torch.equal(weights[n], told[0][1][n]) for n in weights)


DENSE = {
    "onebit_adam": {"freeze_step": 100},
    "onebit_lamb": {"freeze_step": 100},
    "demo": {"min_numel": 10**9},
}


@pytest.mark.parametrize("kind", DENSE)
def test_without_compression_it_is_the_unsharded_optimizer(kind):
    """Dense stages know no shards: but for the order of sums the weights are those under DDP."""
    kinds = tuple(DENSE)
    sharded = told_of(kind, train, 4, lambda kind: (kind, DENSE[kind], 2, range(6)), kinds)
    plain = told_of(kind, train, 2, lambda kind: (kind, DENSE[kind], 0, range(6)), kinds)
    for name, p in plain[0][1].items():
        if kind == "demo":  # signs of sums whose last bits differ
            assert float(((sharded[0][1][name] - p).abs() > 1e-6).double().mean()) < 0.02
        else:
            torch.testing.assert_close(sharded[0][1][name], p, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["onebit_adam", "zero_one_adam", "dgc"])
def test_one_shard_is_bit_for_bit_the_optimizer_under_ddp(kind):
    """A mesh with one shard cuts nothing: the compressed stage too is that of DDP, bit for bit."""
    kinds = ("onebit_adam", "zero_one_adam", "dgc")
    sharded = told_of(kind, train_on_one_shard, 2, lambda kind: (kind,), kinds)
    plain = told_of(kind, train, 2, lambda kind: (kind, {}, 0, range(16)), kinds)
    for (losses, weights), (a, b) in zip(sharded, plain, strict=True):
        assert losses == a
        assert all(torch.equal(weights[n], b[n]) for n in b)


def train_on_one_shard(rank, world_size, kind):
    model, optimizer, handle = build(world_size, kind, {}, 1)
    losses = []
    for step in range(16):
        optimizer.zero_grad()
        loss = sum(loss_of(model, step, r) for r in (2 * rank, 2 * rank + 1)) / 2
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    handle.close()
    return losses, {n: whole(p) for n, p in model.named_parameters()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every kind trained and saved on the way: where, and the results."""
    where = tmp_path_factory.mktemp("optimizers")
    told = run_each(train, 4, [(kind, {}, 2, range(14), where / kind) for kind in KINDS])
    return where, dict(zip(KINDS, told, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_bit_for_bit(saved, kind):
    where, unbroken = saved
    resumed = told_of(kind, train, 4, lambda kind: (kind, {}, 2, range(9, 14), where / kind, True))
    for (a, weights_a), (b, weights_b) in zip(unbroken[kind], resumed, strict=True):
        assert a[9:] == b
        assert all(torch.equal(weights_a[n], weights_b[n]) for n in weights_a)


@pytest.mark.parametrize("kind", ["onebit_adam", "dgc"])
def test_resumes_on_fewer_ranks(saved, kind):
    where, before = saved
    after = told_of(
        kind,
        train,
        2,
        lambda kind: (kind, {}, 2, range(9, 20), where / kind, True),
        ("onebit_adam", "dgc"),
    )
    assert after[0][0][-1] < before[kind][0][0][0]


def clipped(rank, world_size, kind, shards):
    knobs = (
        {"max_grad_norm": 0.05, "freeze_step": 100}
        if kind != "dgc"
        else {"clip_norm": 0.05, "min_numel": 10**9}
    )
    return train(rank, world_size, kind, knobs, shards, range(3))


@pytest.mark.parametrize("kind", ["onebit_adam", "onebit_lamb"])
def test_clipping_is_by_whole_norms(kind):
    sharded, plain = run_ranks(clipped, 4, kind, 2), run_ranks(clipped, 2, kind, 0)
    for name, p in plain[0][1].items():
        torch.testing.assert_close(sharded[0][1][name], p, rtol=1e-4, atol=1e-6)

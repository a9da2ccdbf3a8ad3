"""Checkpoints of sharded models: bit for bit on the same mesh, cut anew on another."""

from __future__ import annotations

import pytest
import torch

import commkit
from commkit import checkpoint

from ..harness import run_ranks
from .models import grid, line, loss_of, make, shard, whole


def build(mesh_shape, scheme, knobs):
    replicas, shards = mesh_shape
    model = make()
    if replicas:
        mesh = grid(replicas, shards)
        shard(model, mesh["shard"])
    else:
        mesh = None
        shard(model, line(shards))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    return model, optimizer, commkit.attach(model, scheme, optimizer, mesh=mesh, **knobs)


def contents(model, optimizer, handle):
    return {
        "replicated": {"model": model, "optimizer": optimizer},
        "per_rank": {},
        "reducer": handle.reducer,
        "comm": handle.comm,
    }


def go(model, optimizer, rank, steps):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step, rank)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses


def run(rank, world_size, mesh, scheme, knobs, directory, steps, save_at=None, load=False):
    model, optimizer, handle = build(mesh, scheme, knobs)
    if load:
        checkpoint.load(directory, **contents(model, optimizer, handle))
    losses = []
    for step in steps:
        losses += go(model, optimizer, rank, [step])
        if step == save_at:
            checkpoint.save(directory, **contents(model, optimizer, handle))
    weights = {n: whole(p) for n, p in model.named_parameters()}
    moments = {}
    for name, p in model.named_parameters():
        if p in optimizer.state:
            moments[name] = whole(optimizer.state[p]["exp_avg"])
    return losses, weights, moments, handle.state_dict()


CASES = [
    ((2, 2), "int8", {"rounding": "nearest", "min_numel": 64}),
    ((2, 2), "powersgd", {"rank": 2}),
    ((2, 2), "topk", {"density": 0.05, "min_numel": 64}),
    ((0, 4), "qsdp", {"min_numel": 64}),
    ((0, 4), "qsdp", {"min_numel": 64, "gradient_bits": 4, "feedback": "error_feedback"}),
]


@pytest.mark.parametrize(("mesh", "scheme", "knobs"), CASES)
def test_resumes_bit_for_bit(tmp_path, mesh, scheme, knobs):
    at = tmp_path / "at"
    unbroken = run_ranks(run, 4, mesh, scheme, knobs, at, range(8), 3)
    resumed = run_ranks(run, 4, mesh, scheme, knobs, at, range(4, 8), None, True)
    for (a, weights_a, _, state_a), (b, weights_b, _, state_b) in zip(
        unbroken, resumed, strict=True
    ):
        assert a[4:] == b
        assert all(torch.equal(weights_a[n], weights_b[n]) for n in weights_a)
        assert all(torch.equal(state_a[k], state_b[k]) for k in state_a)


def global_residuals(told, mesh):
    """Whole residuals by key, flat, each the mean over the replicas, from what all ranks hold."""
    replicas, shards = max(mesh[0], 1), mesh[1]
    residuals = {}
    for key in {k for *_, state in told for k in state if k.startswith("rank/")}:
        if key.startswith("rank/unsharded/"):  # (W, n): rows of chunks, the last ones filled up
            rows = torch.stack([state[key] for *_, state in told]).mean(0)
            numel = told[0][1][key.removeprefix("rank/unsharded/")].numel()
            residuals[key] = rows.reshape(-1)[:numel]
            continue
        columns = []
        for s in range(shards):
            present = [told[r * shards + s][3].get(key) for r in range(replicas)]
            present = [x for x in present if x is not None]
            columns += [sum(present) / replicas] if present else []
        residuals[key] = torch.cat(columns).reshape(-1)
    return residuals


@pytest.mark.parametrize(
    ("old", "new", "scheme", "knobs"),
    [
        ((2, 2), (1, 2), "topk", {"density": 0.05, "min_numel": 64}),
        ((2, 2), (2, 1), "topk", {"density": 0.05, "min_numel": 64}),
        ((2, 2), (1, 4), "topk", {"density": 0.05, "min_numel": 64}),
        ((1, 2), (2, 2), "topk", {"density": 0.05, "min_numel": 64}),
        ((2, 2), (4, 1), "int8", {"rounding": "nearest", "min_numel": 64}),
        ((2, 2), (2, 1), "powersgd", {"rank": 2}),
        ((0, 4), (0, 2), "qsdp", {"gradient_bits": 4, "feedback": "error_feedback"}),
        ((0, 2), (0, 4), "qsdp", {"gradient_bits": 4, "feedback": "error_feedback"}),
    ],
)
def test_another_mesh_keeps_weights_moments_and_what_is_unsent(tmp_path, old, new, scheme, knobs):
    at = tmp_path / "at"
    size = max(old[0], 1) * old[1]
    before = run_ranks(run, size, old, scheme, knobs, at, range(4), 3)
    size = max(new[0], 1) * new[1]
    loaded = run_ranks(run, size, new, scheme, knobs, at, range(0), None, True)
    for _, weights, moments, _ in loaded:
        assert all(torch.equal(weights[n], before[0][1][n]) for n in weights)
        assert all(torch.equal(moments[n], before[0][2][n]) for n in before[0][2])
    was, is_now = global_residuals(before, old), global_residuals(loaded, new)
    assert set(was) == set(is_now)
    for key, value in was.items():
        torch.testing.assert_close(is_now[key], value, rtol=1e-6, atol=1e-7)
    after = run_ranks(run, size, new, scheme, knobs, at, range(4, 14), None, True)
    assert after[0][0][-1] < before[0][0][0]


def mixed_up(rank, world_size, directory):
    model, optimizer, handle = build((0, 2), "qsdp", {})
    checkpoint.save(directory, **contents(model, optimizer, handle))
    plain = make()
    ddp = torch.nn.parallel.DistributedDataParallel(plain)
    other = commkit.attach(ddp, "int8")
    try:
        checkpoint.load(
            directory, replicated={}, per_rank={}, reducer=other.reducer, comm=other.comm
        )
    except checkpoint.CheckpointError as error:
        return str(error)
    return "accepted"


def test_a_sharded_checkpoint_is_not_for_a_model_that_is_not(tmp_path):
    for text in run_ranks(mixed_up, 2, tmp_path / "at"):
        assert "shard it with fully_shard" in text

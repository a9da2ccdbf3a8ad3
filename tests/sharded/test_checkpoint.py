"""Checkpoints of sharded models: bit for bit on the same mesh, cut anew on another."""

from __future__ import annotations

import pytest
import torch

import commkit
from commkit import checkpoint

from ..harness import run_ranks
from .models import grid, line, loss_of, make, shard, whole
from .together import run_each

pytestmark = pytest.mark.timeout(300)


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
    state = handle.state_dict()
    handle.close()
    return losses, weights, moments, state


CASES = [
    ((2, 2), "int8", {"rounding": "nearest", "min_numel": 64}),
    ((2, 2), "powersgd", {"rank": 2}),
    ((2, 2), "topk", {"density": 0.05, "min_numel": 64}),
    ((0, 4), "qsdp", {"min_numel": 64}),
    ((0, 4), "qsdp", {"min_numel": 64, "gradient_bits": 4, "feedback": "error_feedback"}),
]


def size_of(mesh):
    return max(mesh[0], 1) * mesh[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every case trained for eight steps and saved after the fourth: where, and the results."""
    where = tmp_path_factory.mktemp("saved")
    cases = [(*case, where / str(at), range(8), 3) for at, case in enumerate(CASES)]
    return where, run_each(run, 4, cases)


@pytest.mark.parametrize("at", range(len(CASES)), ids=[case[1] for case in CASES])
def test_resumes_bit_for_bit(saved, at):
    where, unbroken = saved
    cases = [(*case, where / str(i), range(4, 8), None, True) for i, case in enumerate(CASES)]
    resumed = run_each(run, 4, cases)[at]
    for (a, weights_a, _, state_a), (b, weights_b, _, state_b) in zip(
        unbroken[at], resumed, strict=True
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


TOPK = ("topk", {"density": 0.05, "min_numel": 64})
FEEDBACK = ("qsdp", {"gradient_bits": 4, "feedback": "error_feedback"})
MOVES = [
    ((2, 2), (1, 2), *TOPK),
    ((2, 2), (2, 1), *TOPK),
    ((2, 2), (1, 4), *TOPK),
    ((1, 2), (2, 2), *TOPK),
    ((2, 2), (4, 1), "int8", {"rounding": "nearest", "min_numel": 64}),
    ((2, 2), (2, 1), "powersgd", {"rank": 2}),
    ((0, 4), (0, 2), *FEEDBACK),
    ((0, 2), (0, 4), *FEEDBACK),
]


def run_moves(rank, world_size, moves, which, steps, save_at, load):
    """The moves of this many ranks; nothing for the others."""
    told = {}
    for at, (old, new, scheme, knobs, directory) in enumerate(moves):
        mesh = (old, new)[which]
        if size_of(mesh) == world_size:
            told[at] = run(rank, world_size, mesh, scheme, knobs, directory, steps, save_at, load)
    return told


def told_of_moves(moves, which, steps, save_at=None, load=False):
    """For each move the results in rank order."""
    told = {}
    for world_size in (2, 4):
        (of_ranks,) = run_each(run_moves, world_size, [(moves, which, steps, save_at, load)])
        for at in of_ranks[0]:
            told[at] = [each[at] for each in of_ranks]
    return told


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """Every move: results when it was saved, when it was loaded, and after ten more steps."""
    where = tmp_path_factory.mktemp("moved")
    moves = [(*move, where / str(at)) for at, move in enumerate(MOVES)]
    return (
        told_of_moves(moves, 0, range(4), 3),
        told_of_moves(moves, 1, range(0), None, True),
        told_of_moves(moves, 1, range(4, 14), None, True),
    )


@pytest.mark.parametrize("at", range(len(MOVES)), ids=[f"{m[0]}-{m[1]}-{m[2]}" for m in MOVES])
def test_another_mesh_keeps_weights_moments_and_what_is_unsent(moved, at):
    before, loaded, after = (told[at] for told in moved)
    old, new, *_ = MOVES[at]
    for _, weights, moments, _ in loaded:
        assert all(torch.equal(weights[n], before[0][1][n]) for n in weights)
        assert all(torch.equal(moments[n], before[0][2][n]) for n in before[0][2])
    was, is_now = global_residuals(before, old), global_residuals(loaded, new)
    assert set(was) == set(is_now)
    for key, value in was.items():
        torch.testing.assert_close(is_now[key], value, rtol=1e-6, atol=1e-7)
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

"""Any Reducer on the replicate axis of a mesh: shards of gradients between replicas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import commkit

from ..harness import run_ranks
from .models import gradients, grid, loss_of, make, shard, whole
from .together import run_each

SHARDS = 2
COUNTERS = ("shared/step", "counts")  # which go on whatever happens


def build(me, world_size, scheme, /, **knobs):
    mesh = grid(world_size // SHARDS, SHARDS)
    model = shard(make(seed=me // SHARDS), mesh["shard"])  # replicas start from different weights
    return model, commkit.attach(model, scheme, mesh=mesh, **knobs)


def local(x):
    return x.detach().to_local() if isinstance(x, DTensor) else x.detach()


def reference(rank, world_size, steps):
    """One process that sees all batches."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        sum(loss_of(model, step, r) for r in range(4)).div(4).backward()
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}


def train(rank, world_size, scheme, steps, knobs):
    model, handle = build(rank, world_size, scheme, **knobs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, step, rank)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    shapes = {k: tuple(v.shape) for k, v in handle.state_dict().items()}
    locals_ = {n: local(p).shape for n, p in model.named_parameters() if p.requires_grad}
    handle.close()
    return (
        losses,
        {n: whole(p) for n, p in model.named_parameters()},
        shapes,
        locals_,
        handle.last_step,
    )


def test_full_precision_equals_one_device_that_sees_all_data():
    told = run_ranks(train, 4, "ddp", 5, {})
    expected = reference(0, 1, 5)
    for _, weights, _, _, stats in told:
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
        assert stats.num_contributors == 4
        assert stats.wire_bytes > 0


SCHEMES = [
    ("int8", 20, {"min_numel": 64}),
    ("sign", 20, {"min_numel": 64}),
    ("powersgd", 20, {"rank": 2}),
    ("topk", 20, {"density": 0.1, "min_numel": 64}),
    ("ef21", 20, {"density": 0.1, "min_numel": 64}),
    ("int8", 20, {"rounding": "nearest", "min_numel": 64}),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", range(len(SCHEMES)), ids=[str(case[0]) for case in SCHEMES])
def test_schemes_train_and_replicas_stay_equal(case):
    told = run_each(train, 4, SCHEMES)[case]
    losses = [sum(each[0][step] for each in told) for step in (0, -1)]
    assert losses[1] < 0.7 * losses[0]
    for _, weights, shapes, locals_, _ in told:
        assert all(torch.equal(weights[n], told[0][1][n]) for n in weights)
        residuals = {k.removeprefix("rank/"): s for k, s in shapes.items() if k.startswith("rank/")}
        assert all(
            math.prod(s) <= locals_[k.rpartition("::")[2]].numel() for k, s in residuals.items()
        )


def with_a_frozen_unit(rank, world_size):
    mesh = grid(2, 2)
    model = make(seed=rank // SHARDS)
    model.blocks[1].requires_grad_(False)
    shard(model, mesh["shard"])
    commkit.attach(model, "int8", mesh=mesh, min_numel=64)
    for step in range(3):
        model.zero_grad()
        loss_of(model, step, rank).backward()
    return gradients(model)


def test_a_frozen_unit_is_left_out():
    told = run_ranks(with_a_frozen_unit, 4)
    for each in told:
        assert each
        assert not any(name.startswith("blocks.1.") for name in each)
        assert all(torch.equal(each[name], told[0][name]) for name in each)


def both_axes(rank, world_size, inside):
    mesh = grid(2, 2)
    model = shard(make(seed=rank // SHARDS), mesh["shard"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    block = {"name": "hsdp", "scheme": {"name": "int8", "min_numel": 64}, "inside": inside}
    handle = commkit.attach(model, block, optimizer, mesh=mesh)
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        loss = loss_of(model, step, rank)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses, {n: whole(p) for n, p in model.named_parameters()}, handle.last_step


@pytest.mark.parametrize(
    "inside",
    [{"name": "qsdp", "min_numel": 1}, {"name": "zeropp", "min_numel": 1, "local_size": 2}],
)
def test_both_axes_may_be_compressed(inside):
    told = run_ranks(both_axes, 4, inside)
    first, last = (sum(losses[at] for losses, *_ in told) for at in (0, -1))
    assert last < 0.7 * first
    for _, weights, stats in told:
        assert all(torch.equal(weights[n], told[0][1][n]) for n in weights)
        assert 0 < stats.inter_node_bytes < stats.wire_bytes < stats.dense_bytes


def one_scheme_twice(rank, world_size, accumulate):
    """Gradients of two micro-batches, in one synchronised backward pass or of their mean."""
    model, handle = build(rank, world_size, "int8", min_numel=1)
    if accumulate:
        model.set_requires_gradient_sync(False)
        (loss_of(model, 0, rank) / 2).backward()
        silent = handle.last_step.wire_bytes
        model.set_requires_gradient_sync(True)
        (loss_of(model, 1, rank) / 2).backward()
    else:
        silent = 0
        ((loss_of(model, 0, rank) + loss_of(model, 1, rank)) / 2).backward()
    return silent, gradients(model)


def test_accumulation_sends_once():
    summed = run_ranks(one_scheme_twice, 4, True)
    at_once = run_ranks(one_scheme_twice, 4, False)
    for (silent, a), (_, b) in zip(summed, at_once, strict=True):
        assert silent == 0
        assert all(
            torch.allclose(a[n], b[n], atol=0.02 * float(b[n].abs().max()) + 1e-7) for n in b
        )


def uneven_use(rank, world_size):
    """The second replica uses parameters that the first does not."""
    model, _ = build(rank, world_size, "ddp")
    seen = []
    for step in range(3):
        model.zero_grad()
        loss_of(model, step, rank, spare=rank // SHARDS == 1).backward()
        seen.append(gradients(model))
    return seen


def test_replicas_may_use_different_parameters():
    told = run_ranks(uneven_use, 4)
    for step in range(3):
        model = make()
        if step == 0:
            sum(loss_of(model, 0, r, spare=r // SHARDS == 1) for r in range(4)).div(4).backward()
            for name, p in model.named_parameters():
                if p.grad is not None:
                    torch.testing.assert_close(told[0][0][name], p.grad, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(t[step][n], told[0][step][n]) for t in told for n in t[step])


def with_nan(rank, world_size, broken):
    model, handle = build(rank, world_size, "int8", rounding="nearest", min_numel=1)
    for step in range(3):
        model.zero_grad()
        before = {k: v.clone() for k, v in handle.state_dict().items()}
        loss = loss_of(model, step, rank)
        if step == 1 and rank == broken:
            loss = loss * float("nan")
        loss.backward()
        if step == 1:
            after = handle.state_dict()
            same = all(torch.equal(before[k], after[k]) for k in before if k not in COUNTERS)
            return same and set(before) == set(after), handle.last_step.nonfinite
    return None


def test_a_step_that_is_not_finite_leaves_no_trace_in_any_shard():
    for same, nonfinite in run_ranks(with_nan, 4, 3):
        assert same
        assert nonfinite


def shard_of_nan(rank, world_size):
    """inf in one row of one parameter's gradient, which one shard alone holds."""
    model, handle = build(rank, world_size, "int8", rounding="nearest", min_numel=1)
    loss_of(model, 0, rank).backward()
    before = {k: v.clone() for k, v in handle.state_dict().items()}
    model.zero_grad()
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(rank))
    first = torch.tensor([[float("inf")], [1.0], [1.0]])
    if rank == 0:
        model.few.register_forward_pre_hook(
            lambda m, args: m.weight.register_hook(lambda g: g * first) and None
        )
    model(x).sum().backward()
    after = handle.state_dict()
    return all(torch.equal(before[k], after[k]) for k in before if k not in COUNTERS)


def test_all_shards_hear_of_inf_in_one():
    assert all(run_ranks(shard_of_nan, 4))


def clipped(rank, world_size, sharded):
    if sharded:
        model, _ = build(rank, world_size, "topk", max_grad_norm=0.1, min_numel=10**9)
        loss_of(model, 0, rank).backward()
        return gradients(model)
    model = make()
    ddp = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    commkit.attach(ddp, "topk", max_grad_norm=0.1, min_numel=10**9)
    # What a shard's reduction gets: the mean over the ranks of a replica.
    loss = sum(loss_of(ddp, 0, r) for r in ((0, 1) if rank == 0 else (2, 3))) / 2
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_clipping_sees_whole_gradients():
    ours, theirs = run_ranks(clipped, 4, True), run_ranks(clipped, 2, False)
    for name, g in theirs[0].items():
        torch.testing.assert_close(ours[0][name], g, rtol=1e-4, atol=1e-7)


class Foreign:
    """Somebody else's reduce-scatter."""

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        raise AssertionError("not used")


def attach(mesh, /, scheme="int8", prepare=lambda model: None, **options):
    model = shard(make(), mesh["shard"])
    prepare(model)
    commkit.attach(model, scheme, **options)
    return model


def of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def three_axes():
    return init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("a", "b", "c"))


CASES = {
    "native": lambda mesh: commkit.attach(shard(make(), mesh), "int8", mesh=mesh),
    "no mesh": lambda mesh: attach(mesh),
    "not wrapped": lambda mesh: commkit.attach(make(), "int8", of(make()), mesh=mesh),
    "no replicas": lambda mesh: attach(mesh, mesh=mesh["shard"]),
    "no optimizer": lambda mesh: attach(mesh, "qsdp"),
    "plain": lambda mesh: commkit.attach(make(), "qsdp", of(make())),
    "one rank": lambda mesh: attach(
        mesh, mesh=mesh, **({"rounding": "oops"} if dist.get_rank() == 1 else {})
    ),
    "custom collectives": lambda mesh: attach(
        mesh, prepare=lambda m: m.blocks[0].set_custom_reduce_scatter(Foreign()), mesh=mesh
    ),
    "all-reduce hook": lambda mesh: attach(
        mesh, prepare=lambda m: m.set_all_reduce_hook(lambda reduced: None), mesh=mesh
    ),
    "process group": lambda mesh: attach(mesh, mesh=mesh, process_group=mesh["shard"].get_group()),
    "uneven mesh": lambda mesh: attach(mesh, mesh=three_axes()),
    "twice": lambda mesh: commkit.attach(attach(mesh, mesh=mesh), "int8", mesh=mesh),
}


def refused(rank, world_size, case):
    mesh = grid(2, 2)
    try:
        CASES[case](mesh)
    except Exception as error:
        dist.barrier()
        return f"{type(error).__name__}: {error}"
    return "accepted"


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("native", "shard axis alone"),
        ("no mesh", "give the whole mesh"),
        ("not wrapped", "shard the model first"),
        ("no replicas", "give the whole mesh"),
        ("no optimizer", "attach(model, scheme, optimizer)"),
        ("plain", "fully_shard"),
        ("one rank", "rank 1"),
        ("custom collectives", "blocks.0 has custom collectives already"),
        ("all-reduce hook", "all-reduce hook already"),
        ("process group", "give mesh="),
        ("uneven mesh", "must have two axes"),
        ("twice", "attached already"),
    ],
)
def test_what_cannot_work_is_refused_on_every_rank(case, says):
    told = run_each(refused, 4, [(name,) for name in CASES])[list(CASES).index(case)]
    for rank, text in enumerate(told):
        assert says in text or (case == "one rank" and rank == 1 and "oops" in text), told

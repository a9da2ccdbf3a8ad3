"""What users combine with sharding: mixed precision, accumulation, checkpointing, offload, compile, tied weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import commkit
from commkit.sharded import CompressedAllGather

from ..harness import run_ranks
from .models import batch, gradients, line, loss_of, make, shard, whole
from .together import run_each


def build(world_size, scheme, option, **knobs):
    model = make()
    options = {}
    if option == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    elif option == "bf16 gradients":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)
    elif option == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    elif option == "secondary":
        options["reshard_after_forward"] = 2
    elif option == "keep":
        options["reshard_after_forward"] = False
    elif option == "recompute":
        for at, block in enumerate(model.blocks):
            model.blocks[at] = checkpoint_wrapper(block)
    shard(model, line(world_size), **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    handle = commkit.attach(model, scheme, optimizer, **knobs) if scheme else None
    if option == "compile":
        model = torch.compile(model, backend="eager")
    return model, optimizer, handle


def train(rank, world_size, scheme, option, steps, knobs):
    model, optimizer, handle = build(world_size, scheme, option, **knobs)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, step, rank)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    if handle is not None:
        handle.close()
    return losses, handle and handle.last_step.wire_bytes


OPTIONS = ["bf16", "bf16 gradients", "offload", "secondary", "keep", "recompute", "compile"]
KNOBS = {"qsdp": {"min_numel": 1}, "zeropp": {"min_numel": 1, "gradient_bits": 8, "local_size": 2}}
SCHEMES = [None, *KNOBS]
RUNS = [(scheme, option, 15, KNOBS.get(scheme, {})) for option in OPTIONS for scheme in SCHEMES]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("scheme", list(KNOBS))
def test_it_follows_fsdp_under(option, scheme):
    told = run_each(train, 4, RUNS)
    plain, ours = (told[RUNS.index((s, option, 15, KNOBS.get(s, {})))] for s in (None, scheme))
    before, exact, close = plain[0][0][0], plain[0][0][-1], ours[0][0][-1]
    assert close != exact
    assert abs(close - exact) < 0.08 * (before - exact)


def seen(rank, world_size, option):
    """What each gather gave, by unit, in one step and the first forward pass of the next."""
    model, optimizer, _ = build(world_size, "qsdp", option, min_numel=1)
    gathered = {}
    original = CompressedAllGather.__call__

    def record(self, output_tensor, input_tensor, group, async_op=False):
        work = original(self, output_tensor, input_tensor, group, async_op)
        gathered.setdefault(self._unit.name, []).append(output_tensor.clone())
        return work

    CompressedAllGather.__call__ = record
    loss_of(model, 0, rank).backward()
    step = {name: list(outs) for name, outs in gathered.items()}
    optimizer.step()
    gathered.clear()
    with torch.no_grad():
        loss_of(model, 1, rank)
    return step, gathered


@pytest.mark.parametrize("option", ["", "recompute"])
def test_forward_backward_and_recomputation_see_the_same_weights(option):
    told = run_ranks(seen, 2, option)
    for step, later in told:
        assert any(len(outs) > 1 for outs in step.values())
        for name, outs in step.items():
            assert all(torch.equal(outs[0], out) for out in outs)
            assert torch.equal(outs[0], told[0][0][name][0])
            assert not torch.equal(outs[0], later[name][0])


def accumulated(rank, world_size, scheme):
    model, _, _ = build(world_size, scheme, "", min_numel=1, weight_bits=32)
    model.set_requires_gradient_sync(False)
    (loss_of(model, 0, rank) / 2).backward()
    model.set_requires_gradient_sync(True)
    (loss_of(model, 1, rank) / 2).backward()
    return gradients(model)


def exact(rank):
    """What a rank's two passes make together, in full precision."""
    model = make()
    sum(loss_of(model, step, rank) for step in (0, 1)).div(2).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_accumulated_gradients_are_quantised_once():
    alone = [exact(rank) for rank in range(2)]
    for told in run_ranks(accumulated, 2, "qsdp"):
        for name, g in told.items():
            own = [each[name] for each in alone]
            # One rounding on each rank, by less than a 255th of its range; one for each pass could be more.
            bound = sum(float(x.max() - x.min()) for x in own) / 2 / 255
            assert float((g - sum(own) / 2).abs().max()) <= bound * 1.01 + 1e-8


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Linear(16, 24, bias=False)
        self.head = nn.Linear(16, 24, bias=False)
        self.head.weight = self.embedding.weight
        self.out = nn.Linear(24, 3)

    def forward(self, x):
        return self.out(torch.relu(self.embedding(x)) + self.head(x))


def tied(rank, world_size, scheme):
    torch.manual_seed(0)
    model = Tied()
    fully_shard(model, mesh=line(world_size))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    if scheme:
        commkit.attach(model, scheme, optimizer, min_numel=1)
    for step in range(10):
        optimizer.zero_grad()
        x, y = batch(step, rank)
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return {n: whole(p) for n, p in model.named_parameters()}


def test_tied_weights_are_one_parameter():
    plain, ours = run_ranks(tied, 2, None), run_ranks(tied, 2, "qsdp")
    for name, p in plain[0].items():
        assert float((ours[0][name] - p).abs().max()) < 0.02


def bytes_of(rank, world_size, bits, dtype):
    model = make(width=128)
    options = {}
    if dtype is not None:
        options["mp_policy"] = MixedPrecisionPolicy(dtype, dtype)
    shard(model, line(world_size), **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    handle = commkit.attach(model, "qsdp", optimizer, weight_bits=bits, gradient_bits=bits)
    loss_of(model, 0, rank).backward()
    stats = handle.last_step
    gathers = sum(x for op, x in handle._shards.bytes.by_op.items() if "gather" in op)
    return stats.wire_bytes, gathers


@pytest.mark.parametrize(("dtype", "ratio"), [(None, 3.8), (torch.bfloat16, 1.9)])
def test_bytes_are_a_quarter_of_fp32_and_half_of_bf16(dtype, ratio):
    full, compressed = run_ranks(bytes_of, 2, 32, dtype), run_ranks(bytes_of, 2, 8, dtype)
    for (_, a), (wire, b) in zip(full, compressed, strict=True):
        assert 0 < b <= a / ratio
        # FSDP's own scatter moves twice its ideal on gloo: against the ideal, half of the gathers.
        assert wire <= 1.5 * a / ratio

"""Optimizers whose state is cut tier by tier: the weights of one device, and the traffic of the formulas."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import commkit
from commkit import checkpoint
from commkit.schemes import make_scheme
from commkit.sharded import PartitionScheme

from ..harness import run_ranks
from .models import loss_of, make, whole
from .together import run_each

pytestmark = pytest.mark.timeout(300)
FULL = {"gradient_bits": 32, "weight_bits": 32}


def build(world_size, knobs, pair, seed=0, width=32, **settings):
    local = max(1, world_size // pair // 2)
    mesh = init_device_mesh(
        "cpu",
        (world_size // pair // local, local, pair),
        mesh_dim_names=("node", "local", "pair"),
    )
    model = make(seed, width=width)
    if pair > 1:
        for block in model.blocks:
            fully_shard(block, mesh=mesh["pair"])
        fully_shard(model, mesh=mesh["pair"])
    scheme = make_scheme("three_level", {"min_numel": 64} | knobs)
    optimizer = scheme(model.named_parameters(), torch.optim.AdamW, mesh, lr=1e-2, **settings)
    return model, optimizer, commkit.attach(model, optimizer)


def contents(model, optimizer, handle):
    return {
        "replicated": {"model": model, "optimizer": optimizer},
        "per_rank": {},
        "reducer": handle.reducer,
        "comm": handle.comm,
    }


def train(rank, world_size, knobs, pair, steps, settings=None, directory=None, load=False):
    model, optimizer, handle = build(world_size, knobs, pair, seed=rank // pair, **(settings or {}))
    if load:
        checkpoint.load(directory, **contents(model, optimizer, handle))
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step, rank)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        if directory is not None and not load and step == 3:
            checkpoint.save(directory, **contents(model, optimizer, handle))
    state = sum(x.numel() for s in optimizer.inner.state.values() for x in s.values() if x.ndim)
    handle.close()
    return losses, {n: whole(p) for n, p in model.named_parameters()}, optimizer.traffic, state


def reference(world_size, steps, max_norm=0.0):
    model = make()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        sum(loss_of(model, step, r) for r in range(world_size)).div(world_size).backward()
        for p in model.parameters():
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        if max_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}


WIDE = {"width": 192}
RUNS = {
    "full, pairs": (FULL, 2, range(4)),
    "full, alone": (FULL, 1, range(4)),
    "full, wide": (FULL, 1, range(3), WIDE),
    "coded, wide": ({}, 1, range(3), WIDE),
    "coded": ({}, 2, range(25)),
    "clipped": (FULL, 2, range(3), {"max_grad_norm": 0.05}),
}


def told_of(name):
    return run_each(train, 4, list(RUNS.values()))[list(RUNS).index(name)]


def elements(**sizes):
    """Trained ones."""
    return sum(p.numel() for p in make(**sizes).parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["full, pairs", "full, alone"])
def test_in_full_precision_it_is_one_device(name):
    told, expected = told_of(name), reference(4, 4)
    for _, weights, _, _ in told:
        for name, p in weights.items():
            # Adam's first steps are of the sign of sums whose last bits differ.
            torch.testing.assert_close(p, expected[name], rtol=1e-3, atol=3e-5)
            assert torch.equal(p, told[0][1][name])


def test_eight_ranks_on_three_axes_are_one_device_too():
    told, expected = run_ranks(train, 8, FULL, 2, range(2)), reference(8, 2)
    for name, p in told[0][1].items():
        torch.testing.assert_close(p, expected[name], rtol=1e-3, atol=3e-5)


@pytest.mark.parametrize("name", ["full, pairs", "full, alone"])
def test_state_is_cut_over_all_ranks(name):
    states = [state for *_, state in told_of(name)]
    assert sum(states) == 2 * elements()  # two moments of every element, once
    assert max(states) < 2 * elements() / 4 * 1.1  # parameters are short


def test_traffic_of_each_tier_is_as_the_formulas_say():
    n = 4 * elements(**WIDE) * 3  # bytes of a rank's weights, over all steps
    for _, _, traffic, _ in told_of("full, wide"):
        # Scatter and gather: (w-1)/w of what a rank has there; a half of it is left for the next tier.
        assert traffic["local"] == pytest.approx(2 * n / 2, rel=0.03)
        assert traffic["node"] == pytest.approx(2 * n / 2 / 2, rel=0.03)


def test_codes_save_on_their_tiers():
    for (_, _, a, _), (_, _, b, _) in zip(
        told_of("full, wide"), told_of("coded, wide"), strict=True
    ):
        # Gradients in 4 bits and a scale for 256; weights in 8 between nodes and in full inside; norms dense.
        assert b["local"] == pytest.approx(a["local"] * (1 / 8 + 1) / 2, rel=0.05)
        assert b["node"] == pytest.approx(a["node"] * (1 / 8 + 1 / 4) / 2, rel=0.1)


def test_it_trains_in_low_precision():
    told = told_of("coded")
    first, last = (sum(losses[at] for losses, *_ in told) for at in (0, -1))
    assert last < 0.6 * first
    for _, weights, _, _ in told:
        assert all(torch.equal(weights[n], told[0][1][n]) for n in weights)


def test_clipping_is_by_the_whole_norm():
    expected = reference(4, 3, 0.05)
    for name, p in told_of("clipped")[0][1].items():
        torch.testing.assert_close(p, expected[name], rtol=1e-3, atol=3e-5)


KNOBS = (FULL, {})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Trained for eight steps and saved after the fourth, in full precision and coded."""
    where = tmp_path_factory.mktemp("partition")
    cases = [(k, 2, range(8), None, where / str(at)) for at, k in enumerate(KNOBS)]
    return where, run_each(train, 4, cases)


@pytest.mark.parametrize("at", range(2), ids=["full", "coded"])
def test_resumes_bit_for_bit(saved, at):
    where, unbroken = saved
    cases = [(k, 2, range(4, 8), None, where / str(i), True) for i, k in enumerate(KNOBS)]
    resumed = run_each(train, 4, cases)[at]
    for (a, weights_a, _, _), (b, weights_b, _, _) in zip(unbroken[at], resumed, strict=True):
        assert a[4:] == b
        assert all(torch.equal(weights_a[n], weights_b[n]) for n in weights_a)


@pytest.mark.parametrize(("world_size", "pair"), [(2, 1), (2, 2), (4, 1)])
def test_pieces_are_cut_anew_for_another_mesh(saved, world_size, pair):
    """In full precision the further course does not depend on how many ranks share the pieces."""
    at = saved[0] / "0"
    pairs = {2: [1, 2], 4: [1, 2]}[world_size]
    ours = run_each(same_batches, world_size, [(p, at) for p in pairs])[pairs.index(pair)]
    theirs = run_each(same_batches, 4, [(1, at), (2, at)])[1]
    for name, p in theirs[0].items():
        torch.testing.assert_close(ours[0][name], p, rtol=1e-4, atol=1e-6)


def same_batches(rank, world_size, pair, directory):
    model, optimizer, handle = build(world_size, FULL, pair)
    checkpoint.load(directory, **contents(model, optimizer, handle))
    for step in range(4, 7):
        optimizer.zero_grad()
        loss_of(model, step, 0).backward()
        optimizer.step()
    return {n: whole(p) for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("make_it", "says"),
    [
        (lambda: PartitionScheme(tiers=()), "must be a list of axes"),
        (lambda: PartitionScheme(tiers="node"), "must be a list of axes"),
        (lambda: PartitionScheme(("node",), {"local": None}), "not among tiers"),
    ],
)
def test_impossible_schemes_are_refused(make_it, says):
    with pytest.raises(ValueError, match=says):
        make_it()


def refused(rank, world_size, case):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("node",))
    model = make()
    scheme = PartitionScheme(("node",))
    try:
        if case == "axis":
            make_scheme("three_level")(model.named_parameters(), torch.optim.AdamW, mesh, lr=1e-2)
        elif case == "names":
            scheme(model.parameters(), torch.optim.AdamW, mesh, lr=1e-2)
        elif case == "other model":
            optimizer = scheme(model.named_parameters(), torch.optim.AdamW, mesh, lr=1e-2)
            commkit.attach(make(), optimizer)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("case", "says"),
    [("axis", "mesh's axes"), ("names", "names"), ("other model", "not in the optimizer")],
)
def test_what_cannot_work_is_refused(case, says):
    for text in run_ranks(refused, 2, case):
        assert says in text

"""QSDP and ZeRO++ on real FSDP2: what is gathered, what is scattered, and what FSDP makes of it."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

import commkit

from ..harness import run_ranks
from .models import gradients, line, loss_of, make, shard, whole
from .together import run_each


def train(rank, world_size, scheme, steps=4, knobs=None, options=None, spare=False):
    """Losses, weights and gradients of a few steps; the scheme None is FSDP's own."""
    model = shard(make(), line(world_size), **(options or {}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    handle = None
    if scheme is not None:
        handle = commkit.attach(model, scheme, optimizer, **(knobs or {}))
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, step, rank, spare=spare and step % 2 == 1)
        loss.backward()
        losses.append(loss.item())
        last = gradients(model)
        optimizer.step()
    if handle is not None:
        handle.close()
    return (
        losses,
        {n: whole(p) for n, p in model.named_parameters()},
        last,
        handle and handle.last_step,
    )


FULL = {"weight_bits": 32, "gradient_bits": 32}
CLOSE = {
    "qsdp": {"min_numel": 1},
    "zeropp": {"min_numel": 1, "gradient_bits": 8, "local_size": 2},
}
RUNS = {
    "fsdp": (None, 4),
    "qsdp, full": ("qsdp", 4, FULL),
    "zeropp, full": ("zeropp", 4, {**FULL, "local_size": 2}),
    "fsdp, long": (None, 30),
    "qsdp": ("qsdp", 30, CLOSE["qsdp"]),
    "zeropp": ("zeropp", 30, CLOSE["zeropp"]),
    "learned": ("qsdp", 30, {"min_numel": 1, "gradient_bits": 4, "levels": "learned"}),
    "feedback": ("qsdp", 30, {"min_numel": 1, "gradient_bits": 4, "feedback": "error_feedback"}),
    "fsdp, unused": (None, 12, None, None, True),
    "qsdp, unused": ("qsdp", 12, CLOSE["qsdp"], None, True),
}
pytestmark = pytest.mark.timeout(300)


def told_of(name, world_size=4):
    return run_each(train, world_size, list(RUNS.values()))[list(RUNS).index(name)]


@pytest.mark.parametrize("scheme", ["qsdp", "zeropp"])
def test_at_32_bits_it_is_fsdp_bit_for_bit(scheme):
    for (a, weights_a, _, _), (b, weights_b, _, stats) in zip(
        told_of("fsdp"), told_of(f"{scheme}, full"), strict=True
    ):
        assert a == b
        assert all(torch.equal(weights_a[name], weights_b[name]) for name in weights_a)
        assert stats.wire_bytes > stats.dense_bytes / 2  # counted all the same


@pytest.mark.parametrize("name", ["qsdp", "zeropp", "learned", "feedback"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_it_follows_fsdp(name, world_size):
    plain, ours = told_of("fsdp, long", world_size), told_of(name, world_size)
    before, exact, close = plain[0][0][0], plain[0][0][-1], ours[0][0][-1]
    assert close != exact
    assert abs(close - exact) < 0.08 * (before - exact)
    assert all(torch.equal(ours[0][1][n], o[1][n]) for o in ours for n in o[1])


def test_unused_parameters_and_frozen_ones_are_left_out():
    plain, ours = told_of("fsdp, unused"), told_of("qsdp, unused")
    assert set(ours[0][2]) == set(plain[0][2])
    before, exact, close = plain[0][0][0], plain[0][0][-1], ours[0][0][-1]
    assert abs(close - exact) < 0.08 * (before - exact)


def warned(rank, world_size):
    model = shard(make(), line(world_size))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        commkit.attach(model, "qsdp", optimizer, gradient_bits=4, feedback="error_feedback")
    return [str(w.message) for w in caught if "bytes on every rank" in str(w.message)]


def test_feedback_of_whole_gradients_says_what_it_costs():
    whole_bytes = 4 * sum(p.numel() for p in make().parameters())
    for told in run_ranks(warned, 2):
        (text,) = told
        said = int(re.search(r"([\d,]+) bytes", text)[1].replace(",", ""))
        assert whole_bytes <= said < 1.05 * whole_bytes

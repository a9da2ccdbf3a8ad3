"""QSDP and ZeRO++ on real FSDP2: what is gathered, what is scattered, and what FSDP makes of it."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

import commkit

from ..harness import run_ranks
from .models import gradients, line, loss_of, make, shard, whole


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
    return (
        losses,
        {n: whole(p) for n, p in model.named_parameters()},
        last,
        handle and handle.last_step,
    )


@pytest.mark.parametrize("scheme", ["qsdp", "zeropp"])
def test_at_32_bits_it_is_fsdp_bit_for_bit(scheme):
    knobs = {"weight_bits": 32, "gradient_bits": 32}
    plain = run_ranks(train, 4, None)
    ours = run_ranks(train, 4, scheme, 4, knobs)
    for (a, weights_a, _, _), (b, weights_b, _, _) in zip(plain, ours, strict=True):
        assert a == b
        assert all(torch.equal(weights_a[name], weights_b[name]) for name in weights_a)


@pytest.mark.parametrize("scheme", ["qsdp", "zeropp"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_it_follows_fsdp(monkeypatch, scheme, world_size):
    knobs = {"min_numel": 1, "gradient_bits": 8}
    if scheme == "zeropp":
        knobs["local_size"] = 2
    plain = run_ranks(train, world_size, None, 30)
    ours = run_ranks(train, world_size, scheme, 30, knobs)
    before, exact, close = plain[0][0][0], plain[0][0][-1], ours[0][0][-1]
    assert abs(close - exact) < 0.05 * (before - exact)
    assert all(torch.equal(ours[0][1][n], o[1][n]) for o in ours for n in o[1])


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


def test_unused_parameters_and_frozen_ones_are_left_out():
    ours = run_ranks(train, 4, "qsdp", 4, {"min_numel": 1}, None, True)
    plain = run_ranks(train, 4, None, 4, None, None, True)
    assert set(ours[0][2]) == set(plain[0][2])

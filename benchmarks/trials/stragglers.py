"""Trials of ``stragglers.py``: what each rank does, and how slow it is made to be."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from commkit.optim import AdaptiveBrakingSGD
from commkit.straggler import (
    CoordinationOptions,
    Coordinator,
    Method,
    Share,
    StepRecord,
    Worker,
)
from commkit.transport import Network

WORKERS, BATCH = 8, 480  # divisible into the units of all schemes
LATENCY_S, SLOPE_S = 0.05, 0.4  # of a round, and per batch: an eighth of one takes 0.05 s
JITTER, SLOW_AT_A_TIME, TAIL_S, TAIL_POWER, LONGEST = 0.06, 2, 0.1, 1.2, 8.0
INPUTS, HIDDEN, OUTPUTS = 16, 24, 4
POOL, HELD_OUT = 2**16, 4096
LR, MOMENTUM = 0.12, 0.9
NOISE = 0.5
_SLICE_S = 0.004  # between looks whether the round is over


@dataclass(frozen=True)
class Arm:
    """One scheme under one trace.

    Args:
        name: for the table.
        method: of the scheme.
        trace: see :func:`latencies`.
        options: fields of :class:`CoordinationOptions` that differ from its defaults.
        models: trained in turn.
        braking: rho, for an optimizer that brakes.
    """

    name: str
    method: Method
    trace: str
    options: Mapping[str, Any] = field(default_factory=dict)
    models: int = 1
    braking: float | None = None


@dataclass
class Curve:
    """Of one arm: after each step of all models, when, and their mean loss on held-out data."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)  # seconds of each
    contributors: list[int] = field(default_factory=list)
    late: list[int] = field(default_factory=list)
    skipped: int = 0

    def reaches(self, target: float) -> float:
        """Seconds until the loss is at most ``target``; inf if it never is."""
        hits = (s for s, x in zip(self.seconds, self.losses, strict=True) if x <= target)
        return next(hits, float("inf"))


def latencies(trace: str, rounds: int = 2000) -> np.ndarray[Any, Any]:
    """(rounds, workers) seconds that come upon a worker's computing. "none": a little jitter. "two": besides, two workers
    chosen at random in each round are slow, by a heavy-tailed time, as recordings of shared machines show
    it. "one": besides, worker 0 is slowed five times, which :func:`slowdown` does to its computing as well."""
    generator = np.random.default_rng(7)
    seconds = LATENCY_S * generator.lognormal(0.0, JITTER, (rounds, WORKERS))
    tails = TAIL_S * np.minimum(1 + generator.pareto(TAIL_POWER, (rounds, WORKERS)), LONGEST)
    order = generator.permuted(np.tile(np.arange(WORKERS), (rounds, 1)), axis=1)
    if trace != "none":
        seconds += np.where(order < SLOW_AT_A_TIME, tails, 0.0)
    return seconds * np.array([slowdown(trace, worker) for worker in range(WORKERS)])


def slowdown(trace: str, worker: int) -> float:
    return 5.0 if trace == "one" and worker == 0 else 1.0


@functools.cache
def pool() -> tuple[Tensor, Tensor]:
    """What a teacher says of random inputs, with noise."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    first, second = normal(INPUTS, 12) / INPUTS**0.5, normal(12, OUTPUTS) / 12**0.5
    x = normal(POOL, INPUTS)
    y = torch.tanh(2 * x @ first) @ second
    return x, y + NOISE * normal(POOL, OUTPUTS)


def rows(samples: range) -> tuple[Tensor, Tensor]:
    """The run's samples by number; the last ``HELD_OUT`` of the pool are never among them."""
    places = torch.arange(samples.start, samples.stop) * 40503 % (POOL - HELD_OUT)
    x, y = pool()
    return x[places], y[places]


def held_out() -> tuple[Tensor, Tensor]:
    x, y = pool()
    return x[-HELD_OUT:], y[-HELD_OUT:]


def build(seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(100 + seed)
    model = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUTPUTS))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / (p.shape[-1] + 1) ** 0.5)
    return model


def optimizer(arm: Arm, model: nn.Module) -> torch.optim.Optimizer:
    if arm.braking is not None:
        return AdaptiveBrakingSGD(model.parameters(), LR, MOMENTUM, arm.braking)
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


def coordinate(
    arm: Arm, network: Network, options: CoordinationOptions, target: float, limit_s: float
) -> Curve:
    """Train until the loss of every model is below ``target``, or for so many seconds."""
    models = [build(0) for _ in range(arm.models)]  # so that none has a longer way to go
    optimizers = [optimizer(arm, model) for model in models]
    curve, losses = Curve(), {}

    with Coordinator(models, optimizers, arm.method, options, batch=BATCH, network=network) as made:
        start = time.perf_counter()

        def on_step(record: StepRecord) -> None:
            with torch.no_grad():
                x, y = held_out()
                losses[record.model] = float(F.mse_loss(models[record.model](x), y))
            curve.rounds.append(record.step_seconds)
            curve.contributors.append(len(record.contributors))
            curve.late.append(len(record.late))
            if record.model == len(models) - 1:
                curve.seconds.append(time.perf_counter() - start)
                curve.losses.append(sum(losses.values()) / len(losses))
                if max(losses.values()) <= target or curve.seconds[-1] > limit_s:
                    made.stop()

        made.run(10**6, on_step)
        curve.skipped = made.stats.skipped
    return curve


def work(arm: Arm, network: Network, options: CoordinationOptions) -> None:
    """Compute for real, which takes a moment, and sleep for as long as the trace says."""
    model = build(99)
    delays = latencies(arm.trace)
    with Worker(model, arm.method, options, batch=BATCH, network=network) as worker:
        me = worker.party.workers.index(worker.party.rank)
        state = {"round": -1, "due": 0.0}

        def loss_of(share: Share) -> Tensor | None:
            now = time.perf_counter()
            if state["round"] != worker.round:  # the first share of this round
                state["round"], state["due"] = (
                    worker.round,
                    now + delays[worker.round % len(delays), me],
                )
            x, y = rows(share.samples)
            loss = F.mse_loss(model(x), y)
            state["due"] += SLOPE_S * slowdown(arm.trace, me) * len(share.samples) / BATCH
            while (left := state["due"] - time.perf_counter()) > 0:
                if share.superseded():
                    return None
                time.sleep(min(left, _SLICE_S))
            return loss

        worker.run(loss_of)


def run(arm: Arm, network: Network, target: float, limit_s: float) -> Curve | None:
    """One arm; what the first rank has seen."""
    options = CoordinationOptions(timeout_s=60.0, **arm.options)
    if network.rank in options.coordinators:
        return coordinate(arm, network, options, target, limit_s)
    work(arm, network, options)
    return None

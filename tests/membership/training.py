"""A small model trained by workers of which some are lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import commkit
from commkit import Elastic, ElasticOptions
from commkit.membership import Place

QUICK = ElasticOptions(min_workers=2, heartbeat_s=0.25, limit_s=3.0, start_s=30.0)


def make_model() -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 4)
    return model


def loss_of(model: nn.Module, step: int, worker: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + worker)
    x = torch.randn(8, 16, generator=generator)
    return (model(x) - x[:, :8].cos()).square().mean()


def digest(model: nn.Module) -> float:
    return float(sum(p.detach().double().sum() for p in model.parameters()))


def await_joiner(members: Elastic, epoch: int) -> None:
    """Until a worker is to be taken in, with ``epoch``: however slowly it starts, training is not over."""
    members.agent.wait_for(lambda m: m.view.epoch >= epoch)


def die(number: signal.Signals = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def train(
    place: Place,
    tell: Callable[[Any], None],
    scheme: Any,
    steps: int,
    options: ElasticOptions = QUICK,
    at_step: Callable[[int, int], None] | None = None,
    pause_s: float = 0.0,
    at_start: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Train; ``at_step(place.rank, number)`` is called in each block before the optimizer steps, and
    ``at_start(place.rank)`` before anything else."""
    if at_start is not None:
        at_start(place.rank)
    model = make_model()
    log: list[tuple[int, int, int]] = []
    with Elastic(options, place) as members:
        if isinstance(scheme, str) and scheme in ("onebit_adam", "dgc", "demo"):
            optimizer = commkit.schemes.make_scheme(scheme)(model.parameters(), lr=0.05)  # type: ignore[operator]
            handle = commkit.attach(model, optimizer, members=members)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            handle = commkit.attach(model, scheme, optimizer, members=members)
        for step in members.steps(steps, model=model, optimizer=optimizer):
            with step:
                optimizer.zero_grad()
                loss_of(model, step.number, place.rank).backward()
                if at_step is not None:
                    at_step(place.rank, step.number)
                optimizer.step()
                log.append((step.number, members.world_size, handle.last_step.num_contributors))
                tell(step.number)
                time.sleep(pause_s)
    return {"digest": digest(model), "log": log, "epoch": members.epoch}

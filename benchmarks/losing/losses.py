"""One worker is killed, or stopped, as the others enter an all-reduce: when they know, and when they have gone on."""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness  # noqa: F401  (puts the repository on sys.path)
import torch
from torch import nn

import commkit
from commkit import Elastic, ElasticOptions
from commkit.membership import Place
from tests.membership.crew import Crew

_STEPS, _AT, _LOST = 12, 6, 1


def on_worker(
    place: Place,
    tell: Callable[[Any], None],
    numel: int,
    number: int,
    limit_s: float,
    last_words: str,
) -> dict[str, Any]:
    model = nn.Linear(numel // 64, 64, bias=False)
    known = redone = 0.0
    seconds: list[float] = []
    right = True
    options = ElasticOptions(min_workers=2, heartbeat_s=min(0.5, limit_s / 4), limit_s=limit_s)
    with Elastic(options, place) as members:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        commkit.attach(model, "ddp", optimizer, members=members)
        for step in members.steps(_STEPS, model=model, optimizer=optimizer):
            with step:
                model.weight.grad = torch.full_like(model.weight, place.rank)
                if (step.number, place.rank) == (_AT, _LOST):
                    Path(last_words).write_text(str(time.time()))
                    os.kill(os.getpid(), number)
                start = time.perf_counter()
                try:
                    optimizer.step()
                except RuntimeError:
                    known = time.time()
                    raise
                seconds.append(time.perf_counter() - start)
                if step.number == _AT:
                    redone = time.time()
                    left = [r for r in range(place.world_size) if r != _LOST]
                    mean = torch.full_like(model.weight, sum(left) / len(left))
                    right = torch.allclose(model.weight.grad, mean)
    return {"known": known, "redone": redone, "step": statistics.median(seconds), "right": right}


def lose(size: int, numel: int, number: signal.Signals, limit_s: float) -> dict[str, float]:
    """Seconds from the loss until the last worker knew, the last of those that are no neighbours in a ring, and until the
    last had the outcome of the step.

    Raises:
        RuntimeError: the outcome is wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        last_words = Path(folder, "time")
        left = [rank for rank in range(size) if rank != _LOST]
        with Crew(on_worker, size, numel, number, limit_s, str(last_words)) as crew:
            told = crew.finish(*left)
        lost = float(last_words.read_text())
    if not all(each["right"] for each in told):
        raise RuntimeError("a mean is wrong after the loss")
    known = {rank: each["known"] - lost for rank, each in zip(left, told, strict=True)}
    return {
        "all know": max(known.values()),
        "others know": max(
            (s for r, s in known.items() if (r - _LOST) % size not in (1, size - 1)), default=0.0
        ),
        "step redone": max(each["redone"] for each in told) - lost,
        "a step": statistics.median(each["step"] for each in told),
    }

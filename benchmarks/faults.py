"""How soon training goes on after a worker is lost.

    python benchmarks/faults.py [--workers 3 4 6] [--repeats 5] [--json FILE]

Real processes on this machine; one of them is killed, or stopped, as the others enter an all-reduce of 4 MB. They say
when they knew, and when they had the outcome of the same step among those who are left.
"""

from __future__ import annotations

import argparse
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
from report import Result, Target, main
from torch import nn

import commkit
from commkit import Elastic, ElasticOptions
from commkit.membership import Place
from tests.membership.crew import Crew

KNOWN_S, REDONE_S = 0.1, 1.0  # targets after a kill
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
    """Seconds from the loss until the last worker knew, and until the last had the outcome of the step.

    Raises:
        RuntimeError: the outcome is wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        last_words = Path(folder, "time")
        with Crew(on_worker, size, numel, number, limit_s, str(last_words)) as crew:
            told = crew.finish(*(rank for rank in range(size) if rank != _LOST))
        lost = float(last_words.read_text())
    if not all(each["right"] for each in told):
        raise RuntimeError("a mean is wrong after the loss")
    return {
        "all know": max(each["known"] for each in told) - lost,
        "step redone": max(each["redone"] for each in told) - lost,
        "a step": statistics.median(each["step"] for each in told),
    }


def measure(options: argparse.Namespace) -> Result:
    sizes, repeats = ([3], 1) if options.quick else (options.workers, options.repeats)
    result = Result(
        "faults", {"numel": options.numel, "repeats": repeats, "limit_s": options.limit_s}
    )
    title = "seconds after the loss, median and worst of the repeats"
    rows = result.tables[title] = []
    for number in (signal.SIGKILL, signal.SIGSTOP):
        for size in sizes:
            runs = [lose(size, options.numel, number, options.limit_s) for _ in range(repeats)]
            row: dict[str, Any] = {"signal": number.name, "workers": size}
            for what in runs[0]:
                row[what] = statistics.median(run[what] for run in runs)
                row[f"{what}, worst"] = max(run[what] for run in runs)
            rows.append(row)
    killed = [row for row in rows if row["signal"] == "SIGKILL"]
    stopped = [row for row in rows if row["signal"] == "SIGSTOP"]
    result.targets = [
        Target.at_most("kill: all know, s", KNOWN_S, max(r["all know"] for r in killed)),
        Target.at_most("kill: step redone, s", REDONE_S, max(r["step redone"] for r in killed)),
        Target.at_most(
            "stop: all know, s", options.limit_s + 1, max(r["all know"] for r in stopped)
        ),
    ]
    return result


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, nargs="+", default=[3, 4, 6])
    parser.add_argument("--numel", type=int, default=1_000_000, help="elements of the gradient")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--limit-s", type=float, default=5.0, help="when a stopped worker is left out"
    )


if __name__ == "__main__":
    main(__doc__, measure, add_options)

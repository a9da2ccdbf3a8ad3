"""How soon training goes on after a worker is lost.

``python benchmarks/faults.py --json FILE``: real processes on this machine; one of them is killed (or stopped) in an
all-reduce, and the others say when they knew and when the first collective of the new group was right.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

import commkit
from benchmarks.report import environment
from commkit import Elastic, ElasticOptions
from commkit.membership import Place
from tests.membership.crew import Crew

_STEPS = 12
_AT = 6


def _train(
    place: Place, tell: Callable[[Any], None], scheme: Any, numel: int, number: int, limit_s: float
) -> dict[str, Any]:
    model = nn.Linear(numel // 64, 64, bias=False)
    known = redone = 0.0
    settle: list[float] = []
    options = ElasticOptions(min_workers=2, heartbeat_s=min(0.5, limit_s / 4), limit_s=limit_s)
    with Elastic(options, place) as members:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        commkit.attach(model, scheme, optimizer, members=members)
        first_attempt = True
        for step in members.steps(_STEPS, model=model, optimizer=optimizer):
            with step:
                for p in model.parameters():
                    p.grad = torch.full_like(p, float(place.rank + 1))
                if step.number == _AT and place.rank == 1:
                    tell(time.time())
                    os.kill(os.getpid(), number)
                start = time.perf_counter()
                try:
                    optimizer.step()
                except RuntimeError:
                    known = time.time()
                    raise
                settle.append(time.perf_counter() - start)
                if members.epoch > 1 and first_attempt:
                    first_attempt, redone = False, time.time()
        right = all(
            bool((p.grad == p.grad.flatten()[0]).all()) for p in model.parameters() if p.grad is not None
        )
    return {"known": known, "redone": redone, "step_s": statistics.median(settle), "right": right}


def measure(size: int, scheme: Any, numel: int, number: signal.Signals, limit_s: float) -> dict[str, float]:
    """Seconds from the loss until the last worker knew, and until the last had the outcome of the step."""
    with Crew(_train, size, scheme, numel, number, limit_s, deadline_s=120.0) as crew:
        results = crew.finish(*(rank for rank in range(size) if rank != 1))
        (lost,) = crew.told[1]
    if not all(result["right"] for result in results):
        raise RuntimeError("a gradient is wrong after the loss")
    return {
        "all_know_s": max(result["known"] for result in results) - lost,
        "step_redone_s": max(result["redone"] for result in results) - lost,
        "step_s": statistics.median(result["step_s"] for result in results),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[3, 4, 6])
    parser.add_argument("--numel", type=int, default=1_000_000, help="elements of the gradient")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit-s", type=float, default=2.0, help="limit_s, for workers that are stopped")
    parser.add_argument("--json", help="write results to this file")
    args = parser.parse_args()
    rows = []
    for size in args.workers:
        for number in (signal.SIGKILL, signal.SIGSTOP):
            runs = [
                measure(size, "ddp", args.numel, number, args.limit_s) for _ in range(args.repeats)
            ]
            row: dict[str, Any] = {"workers": size, "signal": number.name}
            for key in runs[0]:
                row[key] = statistics.median(run[key] for run in runs)
                row[f"{key}_worst"] = max(run[key] for run in runs)
            rows.append(row)
            print(
                f"{size} workers, {number.name}: all know after {row['all_know_s']:.3f} s (worst "
                f"{row['all_know_s_worst']:.3f}), the step is done again after {row['step_redone_s']:.3f} s (worst "
                f"{row['step_redone_s_worst']:.3f}); a step takes {row['step_s'] * 1e3:.1f} ms",
                flush=True,
            )
    if args.json:
        result = {"environment": environment(), "limit_s": args.limit_s, "rows": rows}
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Where the CPU time of a PowerSGD step goes: torch's hook and commkit's, op by op, on one rank.

One rank alone, so there is no waiting for a peer: what is left is arithmetic and memory traffic. Each
operator's own CPU time per step is shown next to that of plain DDP; what exceeds DDP's is the scheme's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import harness
import model
import torch
from powersgd_vs_torch import ONE_BUCKET_MB, attach_commkit, attach_torch
from report import Result, main
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

_TOP = 16
_FLOOR_MS = 0.3


def on_rank(rank: int, world_size: int, rounds: int, steps: int) -> dict[str, Any]:
    text = model.corpus()
    attach: dict[str, Callable[[DistributedDataParallel], None] | None] = {
        "DDP": None,
        "torch": attach_torch,
        "commkit": attach_commkit,
    }
    runs = {}
    for name, hook in attach.items():
        cap = None if name == "commkit" else ONE_BUCKET_MB
        runs[name] = model.Run(text, rank, world_size, cap)
        if hook is not None:
            hook(runs[name].ddp)
    arms = {name: run.step for name, run in runs.items()}
    timings = harness.interleave(arms, rounds, steps, lambda: None)
    return {
        "timings": timings,
        "ops": {name: _operators(run.step, steps) for name, run in runs.items()},
    }


def _operators(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Own CPU milliseconds per step, by operator, on all threads."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    return {e.key: e.self_cpu_time_total / 1e3 / steps for e in profiler.key_averages()}


def measure(options: argparse.Namespace) -> Result:
    rounds, steps = (2, 2) if options.quick else (20, 3)
    outcomes = harness.run_ranks(on_rank, rounds, steps, deadline_s=900, world_size=1)
    told = harness.values(outcomes)[0]
    timings, ops = told["timings"], told["ops"]
    result = Result("profile_powersgd", {**model.settings(), "ranks": 1, "rounds": rounds})
    result.tables["one rank, ratio to torch's hook"] = [
        harness.timing_row(name, timing, timings["torch"]) for name, timing in timings.items()
    ]
    names = {key for table in ops.values() for key in table}
    extra = {
        key: max(ops[who].get(key, 0.0) - ops["DDP"].get(key, 0.0) for who in ("torch", "commkit"))
        for key in names
    }
    result.tables["own CPU time by operator, ms per step (those a scheme adds to)"] = [
        {"operator": key, **{who: round(ops[who].get(key, 0.0), 2) for who in ops}}
        for key in sorted(extra, key=lambda k: -extra[k])[:_TOP]
        if extra[key] > _FLOOR_MS
    ]
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(__doc__, measure)

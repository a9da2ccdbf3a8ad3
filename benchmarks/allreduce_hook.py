"""commkit's plain all-reduce hook against DDP's own all-reduce: what does going through commkit cost?

Three replicas of the model train in the same processes, by turns of a few steps: DDP as it is, DDP as it is
once more (the control: how far two equal things come out apart on this machine) and DDP with commkit's
``ddp`` scheme. Ratios are to the first, round by round.
"""

from __future__ import annotations

import argparse
from typing import Any

import harness
import model
import torch
import torch.distributed as dist
from report import Result, Target, main

import commkit

LIMIT = 1.03


def on_rank(rank: int, world_size: int, rounds: int, steps: int) -> dict[str, Any]:
    text = model.corpus()
    names = ("DDP", "DDP again", "commkit ddp")
    runs = {name: model.Run(text, rank, world_size) for name in names}
    commkit.attach(runs["commkit ddp"].ddp, "ddp")
    timings = harness.interleave(
        {name: run.step for name, run in runs.items()}, rounds, steps, dist.barrier
    )
    weights = [run.parameters() for run in runs.values()]
    return {"timings": timings, "equal": all(torch.equal(w, weights[0]) for w in weights)}


def measure(options: argparse.Namespace) -> Result:
    rounds, steps = (3, 2) if options.quick else (options.rounds, 4)
    told = harness.values(harness.run_ranks(on_rank, rounds, steps, deadline_s=1500))
    timings = told[0]["timings"]
    result = Result("allreduce_hook", {**model.settings(), "rounds": rounds, "steps": steps})
    result.tables["step time, ratio to DDP in the same round"] = [
        harness.timing_row(name, timing, timings["DDP"]) for name, timing in timings.items()
    ]
    ratio = harness.Ratio.of(timings["commkit ddp"], timings["DDP"])
    equal = all(t["equal"] for t in told)
    result.targets = [
        Target.at_most("all-reduce hook / DDP, step time", LIMIT, ratio.median),
        Target("all-reduce hook: weights equal DDP's, bit for bit", None, str(equal), equal),
    ]
    return result


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=30)


if __name__ == "__main__":
    main(__doc__, measure, add_options)

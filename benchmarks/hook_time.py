"""What a scheme computes in a step of the hook, compiled kernels over pure torch: reductions without the time inside
collectives, two ranks of one thread, the twelve-million-parameter GPT.

Ranks are started anew for each part, since kernels are chosen when commkit is imported; parts alternate.
"""

from __future__ import annotations

import argparse
from statistics import median

import harness
import model
from report import Result, Target, main

import commkit

SCHEMES = ("sign", "int8", "topk")
LIMIT = {"sign": 0.35}
KERNELS = {"compiled": "1", "pure torch": "0"}
WARMUP = 3  # steps: DDP rebuilds its buckets, and the first has no residual


def on_rank(rank: int, world_size: int, scheme: str, steps: int) -> list[float]:
    """Seconds of each step, on one rank."""
    run = model.Run(model.corpus(), rank, world_size)
    handle = commkit.attach(run.ddp, scheme)
    seconds = []
    for _ in range(WARMUP + steps):
        run.step()
        stats = handle.last_step
        seconds.append(stats.reduce_seconds - stats.comm_seconds)
    return seconds[WARMUP:]


def timed(scheme: str, native: str, steps: int) -> float:
    """Median over the steps of the slower rank, in seconds."""
    environment = {"COMMKIT_NATIVE": native}
    told = harness.values(
        harness.run_ranks(on_rank, scheme, steps, deadline_s=300, environment=environment)
    )
    return max(map(median, told))


def measure(options: argparse.Namespace) -> Result:
    rounds, steps = (1, 3) if options.quick else (options.rounds, 12)
    result = Result("hook_time", {**model.settings(), "rounds": rounds, "steps": steps})
    rows = result.tables["milliseconds per step, and ratios of each round"] = []
    for scheme in options.schemes.split(","):
        found = [
            {name: timed(scheme, native, steps) for name, native in KERNELS.items()}
            for _ in range(rounds)
        ]
        ratios = [seconds["compiled"] / seconds["pure torch"] for seconds in found]
        rows.append(
            {
                "scheme": scheme,
                **{name: 1e3 * median(seconds[name] for seconds in found) for name in KERNELS},
                "ratio": median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            }
        )
        if scheme in LIMIT:
            what = f"{scheme}: compiled over pure torch, hook without collectives"
            result.targets.append(Target.at_most(what, LIMIT[scheme], median(ratios)))
    return result


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="with commas")


if __name__ == "__main__":
    main(__doc__, measure, add_options)

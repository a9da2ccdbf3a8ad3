"""commkit's PowerSGD against torch's ``powerSGD_hook``, both rank 4, on the same data from the same weights.

The race: replicas with plain DDP, torch's hook in ONE bucket (it needs that to survive on gloo), commkit with
DDP's default buckets and commkit in one bucket (what the overlap with backward is worth) train 200 steps in
the same processes, by turns of a few steps, so that their times compare; then their losses are compared.

The survival test: 200 steps with DDP's default buckets, in processes of their own under a time limit, for
torch's hook and for commkit. ``--only race|survival`` runs one part.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import harness
import model
import torch
import torch.distributed as dist
from report import Result, Target, main
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torch_powersgd
from torch.nn.parallel import DistributedDataParallel

import commkit

LIMIT = 0.9
RANK = 4
START = 2  # torch's hook cannot start before: DDP rebuilds its buckets after the first step
ONE_BUCKET_MB = 1000.0
TAIL = 20  # training losses averaged at the end of a run


def attach_torch(ddp: DistributedDataParallel) -> None:
    state = torch_powersgd.PowerSGDState(
        process_group=None,
        matrix_approximation_rank=RANK,
        start_powerSGD_iter=START,
        min_compression_rate=2,
        use_error_feedback=True,
        warm_start=True,
    )
    ddp.register_comm_hook(state, torch_powersgd.powerSGD_hook)


def attach_commkit(ddp: DistributedDataParallel) -> None:
    commkit.attach(ddp, "powersgd", rank=RANK, start_step=START)


def race(rank: int, world_size: int, rounds: int, steps: int) -> dict[str, Any]:
    text = model.corpus()
    runs = {
        "DDP": model.Run(text, rank, world_size),
        "torch, one bucket": model.Run(text, rank, world_size, ONE_BUCKET_MB),
        "commkit": model.Run(text, rank, world_size),
        "commkit, one bucket": model.Run(text, rank, world_size, ONE_BUCKET_MB),
    }
    attach_torch(runs["torch, one bucket"].ddp)
    attach_commkit(runs["commkit"].ddp)
    attach_commkit(runs["commkit, one bucket"].ddp)
    timings = harness.interleave(
        {name: run.step for name, run in runs.items()}, rounds - 1, steps, dist.barrier
    )
    return {
        name: {
            "timing": timings[name],
            "train": sum(run.losses[-TAIL:]) / len(run.losses[-TAIL:]),
            "validation": run.validation_loss(),
            "weights": run.parameters(),
        }
        for name, run in runs.items()
    }


def survive(rank: int, world_size: int, who: str, steps: int) -> dict[str, Any]:
    run = model.Run(model.corpus(), rank, world_size)
    (attach_torch if who == "torch" else attach_commkit)(run.ddp)
    start = time.perf_counter()
    for _ in range(steps):
        run.step()
    return {
        "s/step": (time.perf_counter() - start) / steps,
        "loss": sum(run.losses[-TAIL:]) / len(run.losses[-TAIL:]),
        "weights": run.parameters(),
    }


def measure_race(result: Result, rounds: int, steps: int) -> None:
    told = harness.values(harness.run_ranks(race, rounds, steps, deadline_s=2400))
    timings = {name: t["timing"] for name, t in told[0].items()}
    reference = timings["torch, one bucket"]
    result.tables["step time, ratio to torch's hook in the same round"] = [
        harness.timing_row(name, timing, reference) for name, timing in timings.items()
    ]
    losses: dict[str, dict[str, float]] = {
        name: {k: sum(t[name][k] for t in told) / len(told) for k in ("train", "validation")}
        for name in timings
    }
    result.tables[f"loss after {rounds * steps} steps (train: mean of the last {TAIL})"] = [
        {
            "arm": name,
            **{k: round(v, 4) for k, v in both.items()},
            "replicas bit-equal": torch.equal(*(t[name]["weights"] for t in told)),
        }
        for name, both in losses.items()
    ]
    ours, theirs = losses["commkit"], losses["torch, one bucket"]
    ratio = harness.Ratio.of(timings["commkit"], reference)
    result.targets.append(
        Target.at_most("PowerSGD rank 4 / torch's hook, step time", LIMIT, ratio.median)
    )
    for kind in ("train", "validation"):
        result.targets.append(
            Target.at_most(
                f"PowerSGD {kind} loss, commkit (<= torch's)", round(theirs[kind], 5), ours[kind]
            )
        )


def measure_survival(result: Result, steps: int, limit_s: float, attempts: int) -> None:
    rows = []
    for who in ["torch"] * attempts + ["commkit"]:
        outcomes = harness.run_ranks(survive, who, steps, deadline_s=limit_s)
        row: dict[str, Any] = {"hook": who, "outcome": " / ".join(o.status for o in outcomes)}
        row["seconds"] = round(min(o.seconds for o in outcomes), 1)
        finished = all(o.status == "finished" for o in outcomes)
        if finished:
            row["replicas bit-equal"] = torch.equal(*(o.value["weights"] for o in outcomes))
            row["train loss"] = round(sum(o.value["loss"] for o in outcomes) / len(outcomes), 4)
        else:
            culprit = min(outcomes, key=lambda o: (o.status == "stopped", o.seconds))
            row["why"] = " ".join(culprit.detail.split())[-300:].replace("|", "/")
        rows.append(row)
    result.tables[f"{steps} steps with DDP's default buckets, limit {limit_s:.0f} s"] = rows
    well = rows[-1].get("replicas bit-equal", False)
    what = f"commkit PowerSGD: {steps} steps with default buckets, replicas bit-equal"
    result.targets.append(Target(what, None, rows[-1]["outcome"], bool(well)))
    result.notes.append(
        "torch's hook with default buckets: "
        + "; ".join(f"{r['outcome']} after {r['seconds']} s" for r in rows[:-1])
    )


def measure(options: argparse.Namespace) -> Result:
    rounds, steps = (3, 2) if options.quick else (options.steps // 5, 5)
    facts = {"powersgd_rank": RANK, "start_step": START}
    result = Result("powersgd_vs_torch", {**model.settings(), **facts})
    if options.only != "survival":
        result.settings |= {"rounds": rounds, "steps_per_round": steps}
        measure_race(result, rounds, steps)
    if options.only != "race":
        steps, attempts = (6, 1) if options.quick else (options.steps, options.attempts)
        measure_survival(result, steps, options.limit, attempts)
    return result


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", choices=("race", "survival"))
    parser.add_argument("--attempts", type=int, default=2, help="torch's hook, default buckets")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds of a survival run")


if __name__ == "__main__":
    main(__doc__, measure, add_options)

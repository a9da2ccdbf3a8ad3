"""Workers of speeds 1, 1, 2 and 4: wall clock to a loss, asynchronous local SGD over synchronous DiLoCo.

Emulated hosts, one rank each. Four workers train a small network on what a teacher says; sleeps after each step make
them unequal. The target is the loss that DiLoCo, which waits for the slowest, ends with; times count from the first step
and are ratios to DiLoCo's in the same round, all arms run by turns. The server is one more host that hardly computes.
"same H" gives the fastest worker DiLoCo's H and so sends more often; "same round" gives it 4 H, so that tasks last as
long as DiLoCo's rounds.

Outer momentum was chosen for both sides out of 0, 0.3, 0.6 and 0.9 on seed 0, which is not among those measured: 0.9
for DiLoCo, 0.6 for delayed Nesterov. Staleness is a delay in the loop of the momentum, and this small problem moves far
in a round; what 0.9 does there is an arm of its own.

    python benchmarks/async_vs_diloco.py [--link 50mbit|none] [--seeds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from harness import ROOT
from report import Result, Target, main
from torch import Tensor, nn
from torch.nn import functional as F

from commkit.outer import DiLoCo, SyncOptions
from commkit.outer.async_local_sgd import AsyncOptions, AsyncServer, AsyncWorker, PushRecord
from commkit.outer.delayed_nesterov import DelayedNesterov, PushRule, StaleNesterov

DILOCO = "DiLoCo"
SPEEDS = (1, 1, 2, 4)
SLOWEST_STEP_S = 0.04
H, LR, INPUTS, OUTPUTS, ROWS = 32, 0.003, 32, 10, 32
TUNED = {"momentum": 0.6}
ARMS: dict[str, dict[str, Any]] = {
    "delayed Nesterov, dynamic steps, same H": {"knobs": TUNED},
    "delayed Nesterov, dynamic steps, same round": {"sync_every": 4 * H, "knobs": TUNED},
    "delayed Nesterov, fixed steps": {"dynamic": False, "knobs": TUNED},
    "delayed Nesterov, dynamic, same H, momentum 0.9": {},
    "vanilla, dynamic steps, same H": {"rule": StaleNesterov},
}


@dataclass
class Curve:
    """When which loss was reached, and what it took."""

    seconds: list[float]
    losses: list[float]
    steps: int
    rounds: int
    staleness: float = 0.0

    def reaches(self, target: float) -> float:
        """Seconds until the loss is at most ``target``; inf if it never is."""
        hits = (s for s, x in zip(self.seconds, self.losses, strict=True) if x <= target)
        return next(hits, float("inf"))


class Problem:
    """A teacher, and batches of its answers for each shard and step."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self.first = torch.randn(INPUTS, 24, generator=generator) / INPUTS**0.5
        self.second = torch.randn(24, OUTPUTS, generator=generator) / 24**0.5
        self.held_out = self.batch(-1, 0, 2048)

    def batch(self, shard: int, step: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
        draw = (self.seed * 101 + shard + 1) * 1_000_003 + step
        x = torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(draw))
        return x, torch.tanh(2 * x @ self.first) @ self.second

    def model(self) -> nn.Module:
        generator = torch.Generator().manual_seed(self.seed + 1)
        model = nn.Sequential(
            nn.Linear(INPUTS, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, OUTPUTS)
        )
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / (p.shape[-1] + 1) ** 0.5)
        return model

    def step(self, model: nn.Module, inner: torch.optim.Optimizer, shard: int, step: int) -> None:
        x, y = self.batch(shard, step)
        inner.zero_grad()
        F.mse_loss(model(x), y).backward()
        inner.step()

    @torch.no_grad()
    def losses(self, weights: list[dict[str, Tensor]]) -> list[float]:
        model, (x, y) = self.model(), self.held_out
        found = []
        for one in weights:
            model.load_state_dict(one)
            found.append(float(F.mse_loss(model(x), y)))
        return found


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR)


def synchronous(rank: int, world_size: int, seed: int, rounds: int) -> Curve:
    problem = Problem(seed)
    model = problem.model()
    inner = adamw(model)
    seconds, snapshots = [], []
    with DiLoCo(model, inner, sync_every=H, options=SyncOptions(final_sync=False)) as outer:
        outer.comm.barrier()
        start = time.perf_counter()
        for step in range(rounds * H):
            time.sleep(SLOWEST_STEP_S / SPEEDS[rank])
            problem.step(model, inner, rank, step)
            if outer.step % H == 0:
                seconds.append(time.perf_counter() - start)
                snapshots.append({n: x.clone() for n, x in model.state_dict().items()})
    return Curve(seconds, problem.losses(snapshots), len(SPEEDS) * rounds * H, rounds)


def asynchronous(
    rank: int, world_size: int, seed: int, steps: int, arm: dict[str, Any]
) -> Curve | None:
    problem = Problem(seed)
    model = problem.model()
    settings = {"sync_every": H, "grace_s": 0.02, "timeout_s": 60.0, **arm}
    kind: type[PushRule] = settings.pop("rule", DelayedNesterov)
    rule = kind(**settings.pop("knobs", {}))
    options = AsyncOptions(**settings)
    if rank > 0:
        inner = adamw(model)
        with AsyncWorker(model, inner, options) as worker:
            while worker.training:
                time.sleep(SLOWEST_STEP_S / SPEEDS[rank - 1])
                problem.step(model, inner, worker.shard, worker.shard_step)
        return None
    seconds: list[float] = []
    snapshots: list[dict[str, Tensor]] = []
    with AsyncServer(model, rule, options) as server:
        start = time.perf_counter()

        def note(record: PushRecord) -> None:
            seconds.append(time.perf_counter() - start)
            snapshots.append({n: x.clone() for n, x in server.rule.weights.items()})

        stats = server.serve(steps=steps, on_push=note)
    return Curve(
        seconds, problem.losses(snapshots), stats.steps, stats.pushes, stats.mean_staleness
    )


def rank(arm: str, seed: int, rounds: int, out: Path) -> None:
    """One rank of a lab; the first writes the curve to ``out``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if arm == DILOCO:
        curve: Curve | None = synchronous(dist.get_rank(), dist.get_world_size(), seed, rounds)
    else:
        steps = 2 * len(SPEEDS) * rounds * H
        curve = asynchronous(dist.get_rank(), dist.get_world_size(), seed, steps, ARMS[arm])
    if dist.get_rank() == 0 and curve is not None:
        out.write_text(json.dumps(dataclasses.asdict(curve)))
    dist.barrier()
    dist.destroy_process_group()


def run(arm: str, seed: int, rounds: int, link: str) -> Curve:
    """An arm on hosts of its own: as many as workers, and one more if there is a server."""
    from launch.netlab import Lab

    nodes = len(SPEEDS) + (arm != DILOCO)
    with tempfile.TemporaryDirectory() as folder, Lab(nodes=nodes, link=link) as lab:
        out = Path(folder, "curve")
        words = ["--rank-of", arm, "--seed", str(seed), "--rounds", str(rounds), "--out", str(out)]
        environment = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        lab.torchrun(Path(__file__), words, deadline_s=300, env=environment)
        return Curve(**json.loads(out.read_text()))


def measure(options: argparse.Namespace) -> Result:
    rounds, seeds = (2, 1) if options.quick else (12, options.seeds)
    ratios: dict[str, list[float]] = {DILOCO: [1.0], **{arm: [] for arm in ARMS}}
    curves: dict[str, list[Curve]] = {DILOCO: [], **{arm: [] for arm in ARMS}}
    for seed in range(1, seeds + 1):
        reference = run(DILOCO, seed, rounds, options.link)
        target = reference.losses[-1]
        reference_seconds = reference.reaches(target)
        curves[DILOCO].append(reference)
        for arm in ARMS:
            curve = run(arm, seed, rounds, options.link)
            curves[arm].append(curve)
            ratios[arm].append(curve.reaches(target) / reference_seconds)
    result = Result(
        "async_vs_diloco",
        {
            "link": options.link,
            "speeds": list(SPEEDS),
            "slowest_step_s": SLOWEST_STEP_S,
            "sync_every": H,
            "rounds": rounds,
            "seeds": seeds,
        },
    )
    result.tables["wall clock to the loss that DiLoCo ends with"] = [
        {
            "arm": name,
            "ratio median": _figure(median(ratios[name])),
            "min": _figure(min(ratios[name])),
            "max": _figure(max(ratios[name])),
            "inner steps/s": median(c.steps / c.seconds[-1] for c in found),
            "rounds or pushes per worker": median(c.rounds / _per_round(name) for c in found),
            "staleness": median(c.staleness for c in found),
            "final loss": median(c.losses[-1] for c in found),
        }
        for name, found in curves.items()
    ]
    for arm in list(ARMS)[:2]:
        ratio = median(ratios[arm])
        result.targets.append(Target(f"{arm} / DiLoCo", 1.0, _figure(ratio), ratio <= 1.0))
    result.notes.append(
        "asynchronous arms train for twice DiLoCo's inner steps, so their final losses are of longer runs"
    )
    return result


def _figure(ratio: float) -> float | str:
    return round(ratio, 4) if isfinite(ratio) else "not reached"


def _per_round(name: str) -> int:
    return 1 if name == DILOCO else len(SPEEDS)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--link", default="50mbit", help="of every host; none is loopback")
    parser.add_argument("--seeds", type=int, default=3, help="rounds of all arms")
    for name, kind in (("--rank-of", str), ("--seed", int), ("--rounds", int), ("--out", Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)


if __name__ == "__main__":
    if "RANK" in os.environ:
        parser = argparse.ArgumentParser()
        add_options(parser)
        given = parser.parse_args()
        rank(given.rank_of, given.seed, given.rounds, given.out)
    else:
        main(__doc__, measure, add_options)

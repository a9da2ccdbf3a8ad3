"""16 buckets in flight, two chained collectives each, ranks delayed at random: does anything get mixed up?

PowerSGD sends P and then Q of every bucket. On each rank every collective is preceded by a random sleep of
its own, so that ranks are never at the same place. After 500 steps the parameters must equal those of a run
with one single bucket and no delay. With two ranks gloo's sum of two numbers does not depend on the order,
so equal means every bit. (Torch's hooks start the second collective from a callback and fail here.)
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import harness
import torch
from report import Result, Target, main
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import commkit
from commkit.aggregators import PowerSGD
from commkit.feedback import ErrorFeedback
from commkit.types import Aggregated, Aggregator, Comm, StateDict, TensorCtx

LAYERS = 16
WIDTH = 64
BATCH = 8
MEAN_SLEEP_S = 0.0005
SMALL_BUCKET_MB = 0.01  # less than one layer: every layer is a bucket
LARGE_BUCKET_MB = 100.0


class LateComm:
    """A Comm whose collectives begin late."""

    def __init__(self, inner: Comm, delays: random.Random) -> None:
        self._inner = inner
        self._delays = delays
        self.calls = 0

    def all_reduce(self, x: Tensor, op: Any = "sum") -> Tensor:
        time.sleep(self._delays.expovariate(1 / MEAN_SLEEP_S))
        self.calls += 1
        return self._inner.all_reduce(x, op)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@dataclass
class Watched:
    """An aggregator that counts its reductions and collectives, and may delay the latter."""

    inner: Aggregator
    delays: random.Random | None = field(default=None, repr=False)  # differs by rank: not in repr
    reductions: int = field(default=0, init=False, repr=False)
    collectives: int = field(default=0, init=False, repr=False)

    def aggregate(
        self, xs: Sequence[Tensor], ctxs: Sequence[TensorCtx], comm: Comm
    ) -> list[Aggregated]:
        self.reductions += 1
        if self.delays is None:
            return self.inner.aggregate(xs, ctxs, comm)
        late: Any = LateComm(comm, self.delays)
        outcome = self.inner.aggregate(xs, ctxs, late)
        self.collectives += late.calls
        return outcome

    def commit(self, ok: bool) -> None:
        self.inner.commit(ok)

    def state_dict(self) -> StateDict:
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.inner.load_state_dict(state)


def on_rank(rank: int, world_size: int, steps: int, many: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS)]
    net = nn.Sequential(*layers)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / WIDTH**0.5)
    target = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    ddp = DistributedDataParallel(net, bucket_cap_mb=SMALL_BUCKET_MB if many else LARGE_BUCKET_MB)
    delays = random.Random(rank) if many else None
    watched = Watched(PowerSGD(4), delays)
    policy = commkit.Policy(min_numel=0)
    commkit.attach(ddp, commkit.Reducer(watched, ErrorFeedback(), policy))
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-3)
    data = torch.Generator().manual_seed(100 + rank)
    loss, first = torch.zeros(()), 0.0
    for step in range(steps):
        before = watched.reductions
        x = torch.randn(BATCH, WIDTH, generator=data)
        loss = (ddp(x) - x @ target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        buckets = watched.reductions - before  # DDP rebuilds them after the first step
        first = float(loss) if step == 0 else first
    return {
        "buckets": buckets,
        "collectives": watched.collectives,
        "loss": (first, float(loss)),
        "weights": torch.cat([p.detach().reshape(-1) for p in net.parameters()]),
    }


def measure(options: argparse.Namespace) -> Result:
    steps = 20 if options.quick else 500
    facts = {"layers": LAYERS, "steps": steps, "ranks": harness.WORLD_SIZE, "powersgd_rank": 4}
    result = Result("many_buckets", {**facts, "mean_sleep_s": MEAN_SLEEP_S})
    runs, rows = {}, []
    for name, many in (("one bucket", False), ("many buckets, random delays", True)):
        outcomes = harness.run_ranks(on_rank, steps, many, deadline_s=300)
        told = runs[name] = harness.values(outcomes)
        rows.append(
            {
                "run": name,
                "buckets": told[0]["buckets"],
                "delayed collectives": told[0]["collectives"],
                "first loss": told[0]["loss"][0],
                "last loss": told[0]["loss"][1],
                "replicas bit-equal": torch.equal(told[0]["weights"], told[1]["weights"]),
                "seconds": round(max(o.seconds for o in outcomes), 1),
            }
        )
    result.tables["runs"] = rows
    one, many_told = (told[0]["weights"] for told in runs.values())
    worst = float((one - many_told).abs().max())
    equal = torch.equal(one, many_told) and all(row["replicas bit-equal"] for row in rows)
    equal = equal and [row["buckets"] for row in rows] == [1, LAYERS]
    what = f"{LAYERS} buckets with random delays: parameters equal the single-bucket run's"
    result.targets = [Target(what, None, f"max difference {worst:g}", equal)]
    return result


if __name__ == "__main__":
    main(__doc__, measure)

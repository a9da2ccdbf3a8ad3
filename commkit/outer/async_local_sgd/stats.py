"""What asynchronous training reports."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import astuple, dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PushRecord:
    """One push that went into the weights.

    Args:
        number: of the push, counting those that were accepted from 1.
        lease: of the task.
        worker: its rank.
        shard: that was trained on.
        first_step: the shard's step count before.
        steps: inner steps done.
        staleness: versions between download and push.
        version: of the weights after it.
        seconds: of the inner steps, on the worker's clock.
        loss: mean over the task's steps, None if the worker was not told it.
    """

    number: int
    lease: int
    worker: int
    shard: int
    first_step: int
    steps: int
    staleness: int
    version: int
    seconds: float
    loss: float | None = None

    def pack(self) -> Tensor:
        *numbers, loss = astuple(self)
        loss = math.nan if loss is None else loss
        return torch.tensor([*numbers, loss], dtype=torch.float64)

    @classmethod
    def unpack(cls, x: Tensor) -> PushRecord:
        *numbers, seconds, loss = x.tolist()
        number, lease, worker, shard, first_step, steps, staleness, version = map(int, numbers)
        return cls(
            number,
            lease,
            worker,
            shard,
            first_step,
            steps,
            staleness,
            version,
            seconds,
            None if math.isnan(loss) else loss,
        )


@dataclass(slots=True)
class AsyncStats:
    """Totals of a server.

    Args:
        pushes: accepted.
        steps: inner steps in accepted pushes.
        late: dropped, because their lease had ended.
        nonfinite: dropped, because they held inf or NaN.
        too_stale: dropped by the rule.
        expired: leases that ended because their time had.
        lost_workers: ranks, in the order in which they were lost or left.
        staleness: how many accepted pushes had which.
    """

    pushes: int = 0
    steps: int = 0
    late: int = 0
    nonfinite: int = 0
    too_stale: int = 0
    expired: int = 0
    lost_workers: list[int] = field(default_factory=list)
    staleness: Counter[int] = field(default_factory=Counter)

    def count(self, push: PushRecord) -> None:
        self.pushes += 1
        self.steps += push.steps
        self.staleness[push.staleness] += 1

    @property
    def mean_staleness(self) -> float:
        total = sum(self.staleness.values())
        return sum(k * n for k, n in self.staleness.items()) / total if total else 0.0

    @property
    def max_staleness(self) -> int:
        return max(self.staleness, default=0)

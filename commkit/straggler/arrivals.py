"""What workers have sent a coordinator in the round that is under way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..transport import Message
from .protocol import Report
from .results import Result, Results
from .schedule import MiniTask


class _Arrival(NamedTuple):
    report: Report
    number: int  # of the round
    tensors: tuple[Tensor, ...]


class Arrivals:
    """One coordinator's parts of one round's vectors, as they came. Workers are given by number.

    Args:
        plan: what each worker was to compute.
        num_buffers: that come before the vectors: all of the model's on the first coordinator, else none.
        num_others: coordinators that get parts of their own.
    """

    def __init__(
        self,
        plan: Sequence[tuple[MiniTask, ...]] = (),
        num_buffers: int = 0,
        num_others: int = 0,
    ) -> None:
        self.plan, self._num_others = plan, num_others
        self._vectors = (
            1 + num_buffers
        )  # place of the first one's tensors; before all comes the report
        self._of: dict[int, _Arrival] = {}
        self._acknowledged: dict[int, int] = {}

    @property
    def workers(self) -> list[int]:
        """Whose part is here, in ascending order."""
        return sorted(self._of)

    def add(self, worker: int, news: Message) -> None:
        self._of[worker] = _Arrival(Report.unpack(news.tensors[0]), news.sequence, news.tensors)

    def acknowledge(self, worker: int) -> None:
        """One more of the other coordinators has its part."""
        self._acknowledged[worker] = self._acknowledged.get(worker, 0) + 1

    def is_complete(self, worker: int) -> bool:
        """Whether all coordinators have their parts."""
        return worker in self._of and self._acknowledged.get(worker, 0) >= self._num_others

    def report(self, worker: int) -> Report:
        return self._of[worker].report

    def keep(self, worker: int, results: Results) -> None:
        """Take a worker's vectors into ``results``."""
        report, number, tensors = self._of[worker]
        at = self._vectors
        for place, task in enumerate(self.plan[worker]):
            size = 1 + int(tensors[at].sum())
            result = Result(number, tensors[at : at + size], report.losses[place])
            at += size
            key = (task.job, task.worker, task.index)
            if task.coded:
                results.keep(key, result)
            else:
                results.add(key, result)

    def merge_buffers(self, workers: Sequence[int], buffers: Mapping[str, Tensor]) -> None:
        """Batch-norm statistics: into ``buffers``, the mean over ``workers``."""
        if not workers:
            return
        for place, (name, b) in enumerate(buffers.items(), 1):
            theirs = [self._of[worker].tensors[place] for worker in workers]
            if b.is_floating_point():
                b.copy_(torch.stack([x.double() for x in theirs]).mean(0))
            elif name.endswith("num_batches_tracked"):
                b.copy_(torch.stack(theirs).amax(0))
            else:
                b.copy_(theirs[0])

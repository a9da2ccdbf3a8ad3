"""The data by shard: a worker is told which one to train on, and from where."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from launch.tasks import Task


class Shards:
    """Batches of whichever shard and step a worker is told to train on.

    Args:
        task: whose data is dealt into ``count`` shards, as to ``count`` ranks.
        count: of shards.
        per_step: batches in a step.
    """

    def __init__(self, task: Task, count: int, per_step: int) -> None:
        self._task, self._count, self._per_step = task, count, per_step
        self._at = (-1, -1)
        self._batches: Iterator[Tensor] = iter(())

    def batches(self, shard: int, step: int) -> list[Tensor]:
        """Those of step number ``step`` on ``shard``, counted from 0."""
        if self._at != (shard, step):
            loader = self._task.loader(shard, self._count)
            order = loader.batch_sampler
            order.position = step * self._per_step * order.batch * order.world_size
            self._batches = iter(loader)
        self._at = (shard, step + 1)
        return [next(self._batches) for _ in range(self._per_step)]

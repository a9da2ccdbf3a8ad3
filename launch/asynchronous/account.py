"""What workers have pushed since the last line of ``metrics.jsonl``, and the lines that come of it."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from commkit.outer import AsyncServer
from commkit.outer.async_local_sgd import PushRecord
from launch.asynchronous.position import Position
from launch.asynchronous.shards import Shards
from launch.schedule import learning_rate
from launch.traffic import Traffic

if TYPE_CHECKING:
    from launch.train import Job


class Account:
    """
    Args:
        job: what is to be done.
        server: started.
        position: of the run, which lines move on.
    """

    def __init__(self, job: Job, server: AsyncServer, position: Position) -> None:
        self._settings, self._meter, self._position = job.settings, job.meter, position
        self._workers = len(server.party.workers)
        (batch,) = Shards(job.task, 1, 1).batches(0, 0)
        self._tokens_per_step = job.task.tokens(batch) * job.settings.batch.accumulate
        parameters = server.party.parameters.values()
        self._dense_bytes = sum(p.numel() * p.element_size() for p in parameters)
        self._traffic = Traffic(server.transport)
        self.restart()

    def restart(self) -> None:
        """Nothing has been pushed since now."""
        self._traffic.since_last()
        self._since = time.perf_counter()
        self._pushes = self._steps = 0
        self._worker_seconds = self._loss_sum = 0.0

    def add(self, push: PushRecord) -> None:
        self._pushes += 1
        self._steps += push.steps
        self._loss_sum += (math.nan if push.loss is None else push.loss) * push.steps
        self._worker_seconds += push.seconds

    def lines(self, reached: int) -> list[dict[str, Any]]:
        """Of all steps up to ``reached``, counted from 1, that have none yet."""
        position, settings = self._position, self._settings
        first, count = position.step + 1, reached - position.step
        elapsed = time.perf_counter() - self._since
        sent = self._traffic.since_last()
        if self._meter:
            self._meter.stop(reached, sent.wire_bytes)
            self._meter.start()
        per_step = self._workers * self._tokens_per_step
        position.step, position.tokens = reached, reached * per_step
        position.seconds += elapsed
        return [
            {
                "step": first + place,
                "loss": self._loss_sum / self._steps,
                "lr": learning_rate(first + place, settings.optim.lr, settings.schedule),
                "tokens": (first + place) * per_step,
                "step_seconds": elapsed / count,
                "compute_seconds": self._worker_seconds / self._steps,
                "exposed_comm_seconds": None,
                "comm_seconds": None,
                "reduce_seconds": None,
                "dense_bytes": _part(self._pushes * self._dense_bytes, count, place),
                "payload_bytes": _part(sent.payload_bytes, count, place),
                "wire_bytes": _part(sent.wire_bytes, count, place),
                "rounds": _part(sent.rounds, count, place),
                "residual_norm": None,
                "num_contributors": 1,
                "nonfinite": None,
            }
            for place in range(count)
        ]


def _part(total: int, count: int, place: int) -> int:
    """Place ``place`` of ``count`` nearly equal parts of ``total``, which add up to it."""
    return total * (place + 1) // count - total * place // count

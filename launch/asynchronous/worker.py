"""A rank that trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from commkit.outer import AsyncWorker
from launch.asynchronous.shards import Shards
from launch.loop import autocast
from launch.schedule import set_learning_rate
from launch.world import LauncherWatch, leave

if TYPE_CHECKING:
    from launch.train import Job


@dataclass
class Worker:
    """A rank that trains."""

    job: Job
    worker: AsyncWorker
    optimizer: Optimizer

    def train(self) -> None:
        """Train until the server says that it is enough."""
        settings, watch = self.job.settings, LauncherWatch()
        with self.worker as worker:
            options = worker.options
            count = options.num_shards or len(worker.party.workers)
            data = Shards(self.job.task, count, settings.batch.accumulate)
            meter = self.job.meter
            if meter:
                meter.start()
            while worker.training:
                watch.check()
                set_learning_rate(self.optimizer, worker.shard_step + 1, settings)
                batches = data.batches(worker.shard, worker.shard_step)
                worker.report_loss(self.backward(batches))
                if settings.optim.grad_clip > 0:
                    parameters = worker.model.parameters()
                    torch.nn.utils.clip_grad_norm_(parameters, settings.optim.grad_clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
                if meter:
                    meter.stop(worker.step, worker.last_step.wire_bytes)
                    meter.start()
        leave()

    def backward(self, batches: list[Tensor]) -> float:
        """Leave gradients of the mean loss over ``batches``; returns it."""
        total = 0.0
        device = self.job.device
        for batch in batches:
            with autocast(device, self.job.settings.precision):
                loss = self.job.task.loss(self.worker.model, batch.to(device)) / len(batches)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total

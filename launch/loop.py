"""The training loop: an ordinary DDP loop, timed, recorded and resumable."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torchdata.stateful_dataloader import (  # type: ignore[import-untyped]
    StatefulDataLoader,
)
from tqdm import tqdm

import commkit
from commkit.metrics import MetricsSink
from launch.attachment import Attachment
from launch.interface import InterfaceMeter
from launch.progress import Progress, RandomState
from launch.rundir import RunDirectory, finite
from launch.schedule import learning_rate
from launch.settings import TrainSettings
from launch.tasks import Task
from launch.world import LauncherWatch


@dataclass
class Trainer:
    """Everything a step needs. ``sinks`` is empty except on rank 0.

    ``after_backward`` is called as soon as a synchronised backward pass has returned.
    """

    settings: TrainSettings
    model: DistributedDataParallel
    optimizer: Optimizer
    handle: Attachment
    loader: "StatefulDataLoader[Tensor]"
    task: Task
    device: torch.device
    run: RunDirectory
    after_backward: Callable[[], None] | None = None
    meter: InterfaceMeter | None = None
    sinks: list[MetricsSink] = field(default_factory=list)
    validation_sinks: list[MetricsSink] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.progress = Progress(self.loader, self.task.digest)
        self.random_state = RandomState(self.device)

    @property
    def rank(self) -> int:
        return self.handle.comm.rank

    def train(self, watch: LauncherWatch) -> dict[str, float]:
        """Train up to ``settings.steps`` and evaluate; return the task's validation metrics."""
        batches = iter(self.loader)
        validation = None
        bar = tqdm(
            total=self.settings.steps,
            initial=self.progress.step,
            desc=self.settings.scheme["name"],
            unit="step",
            disable=self.rank != 0,
            mininterval=0.5,
        )
        with bar:
            while self.progress.step < self.settings.steps:
                watch.check()
                record = self.step(batches)
                for sink in self.sinks:
                    sink.write(finite(record))
                validation = self.evaluate_when_due(self.settings.eval.every)
                self.save_when_due()
                bar.update()
                bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
        return self.evaluate() if validation is None else validation

    def step(self, batches: Iterator[Tensor]) -> dict[str, Any]:
        """One optimizer step; returns its line of ``metrics.jsonl``."""
        if self.meter:
            self.meter.start()
        start = time.perf_counter()
        settings = self.settings.optim
        lr = learning_rate(self.progress.step + 1, settings.lr, self.settings.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        local_loss = self.accumulate(batches)
        if settings.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        self.progress.step += 1
        stats = self.handle.last_step
        # The mean for the record is not part of the step: it is not timed, and counted nowhere.
        loss = self.sum_over_ranks(local_loss) / self.handle.comm.world_size
        if self.meter:
            self.meter.stop(self.progress.step, stats.wire_bytes)
        self.progress.tick()
        exposed = stats.exposed_comm_seconds
        return {
            "step": self.progress.step,
            "loss": loss.item(),
            "lr": lr,
            "tokens": self.progress.tokens,
            "step_seconds": seconds,
            "compute_seconds": None if exposed is None else max(0.0, seconds - exposed),
            "exposed_comm_seconds": exposed,
            "comm_seconds": stats.comm_seconds,
            "reduce_seconds": stats.reduce_seconds,
            "dense_bytes": stats.dense_bytes,
            "payload_bytes": stats.payload_bytes,
            "wire_bytes": stats.wire_bytes,
            "rounds": stats.rounds,
            "residual_norm": stats.residual_norm,
            "num_contributors": stats.num_contributors,
        }

    def accumulate(self, batches: Iterator[Tensor]) -> Tensor:
        """Forward and backward of this rank's share; gradients are sent with the last one only.

        Returns the mean loss of the share, a float64 scalar.
        """
        count = self.settings.batch.accumulate
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for micro_batch in range(count):
            batch = next(batches).to(self.device)
            is_last = micro_batch == count - 1
            with nullcontext() if is_last else self.model.no_sync():
                with self.autocast():
                    loss = self.task.loss(self.model, batch) / count
                loss.backward()  # type: ignore[no-untyped-call]
                if is_last and self.after_backward:
                    self.after_backward()
            total += loss.detach()
            self.progress.tokens += self.task.tokens(batch) * self.handle.comm.world_size
        return total

    def autocast(self) -> torch.autocast:
        enabled = self.settings.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def evaluate_when_due(self, every: int) -> dict[str, float] | None:
        """Validation metrics if it is this step's turn, written to the records; else None."""
        if not every or self.progress.step % every:
            return None
        validation = self.evaluate()
        for sink in self.validation_sinks:
            sink.write(finite({"step": self.progress.step, **validation}))
        return validation

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Means over all validation samples; ranks share the work and agree on the result."""
        model, names = self.model.module, self.task.metrics
        for buffer in model.buffers():  # as DDP does before each step: rank 0's are the model's
            self.handle.comm.broadcast(buffer, src=0)
        model.eval()
        # One sum for each metric, then the number of samples.
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=self.device)
        for batch in self.task.validation(self.rank, self.handle.comm.world_size):
            with self.autocast():
                means = self.task.measure(model, batch.to(self.device))
            sums[:-1] += means * batch.shape[0]
            sums[-1] += batch.shape[0]
        model.train()
        *totals, count = self.sum_over_ranks(sums).tolist()
        self.progress.tick()
        return {name: total / count for name, total in zip(names, totals, strict=True)}

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        return self.handle.comm.all_reduce(x, op="sum")

    def save_when_due(self) -> None:
        """Checkpoint at every multiple of ``checkpoint.every`` and at the last step."""
        step, every = self.progress.step, self.settings.checkpoint.every
        if step == self.settings.steps or (every and step % every == 0):
            commkit.checkpoint.save(self.run.checkpoint(step), **self.checkpoint_contents())
            if self.rank == 0:
                self.run.prune_checkpoints()

    def load(self) -> None:
        """Continue from the newest complete checkpoint of the run, or from the start."""
        newest = commkit.checkpoint.latest(self.run.checkpoints)
        if newest is not None:
            commkit.checkpoint.load(
                newest,
                **self.checkpoint_contents(),
                on_resize=self.settings.checkpoint.on_world_size_change,
            )

    def checkpoint_contents(self) -> dict[str, Any]:
        return {
            "replicated": {
                "model": self.model.module,
                "optimizer": self.optimizer,
                "progress": self.progress,
            },
            "per_rank": {"random_state": self.random_state},
            "reducer": self.handle.reducer,
            "comm": self.handle.comm,
        }

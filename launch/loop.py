"""The training loop: an ordinary DDP loop, timed, recorded and resumable."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torchdata.stateful_dataloader import (  # type: ignore[import-untyped]
    StatefulDataLoader,
)
from tqdm import tqdm

import commkit
from commkit import ShardedReplicas
from commkit.checkpoint import PendingSave
from commkit.metrics import MetricsSink, finite
from commkit.outer import AdLoCo, DFedSAM, OuterSync
from commkit.sharded import PartitionedOptimizer
from commkit.types import Comm
from launch import sharding
from launch.attachment import Attachment
from launch.expectation import Expectation
from launch.interface import InterfaceMeter
from launch.progress import Progress, RandomState
from launch.rundir import RunDirectory
from launch.schedule import set_learning_rate
from launch.settings import Precision, TrainSettings
from launch.tasks import Task
from launch.world import LauncherWatch


@dataclass
class Trainer:
    """Everything a step needs. ``sinks`` is empty except on rank 0.

    ``sharded`` is for checkpoints of local updates whose replicas are sharded.
    ``after_backward`` is called as soon as a synchronised backward pass has returned.
    ``expectation`` is of a scheme that was chosen by prediction.
    """

    settings: TrainSettings
    model: nn.Module
    optimizer: Optimizer
    handle: Attachment
    loader: "StatefulDataLoader[Tensor]"
    task: Task
    device: torch.device
    run: RunDirectory
    sharded: ShardedReplicas | None = None
    after_backward: Callable[[], None] | None = None
    meter: InterfaceMeter | None = None
    expectation: Expectation | None = None
    sinks: list[MetricsSink] = field(default_factory=list)
    validation_sinks: list[MetricsSink] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.progress = Progress(self.loader, self.task.digest)
        self.random_state = RandomState(self.device)
        self.time_is_up = False  # on all ranks alike
        self.pending_save: PendingSave | None = None

    @property
    def comm(self) -> Comm:
        """Of all ranks of the job."""
        return self.handle.comm if self.sharded is None else self.sharded.comm

    @property
    def rank(self) -> int:
        return self.comm.rank

    @property
    def ended(self) -> bool:
        """Whether no more steps are to be done."""
        return self.time_is_up or self.progress.step >= self.settings.steps

    def train(self, watch: LauncherWatch) -> dict[str, float]:
        """Train until the run has ended and evaluate; return the task's validation metrics."""
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
            while not self.ended:
                watch.check()
                record = self.step(batches)
                for sink in self.sinks:
                    sink.write(finite(record))
                self.compare_with_prediction(record)
                validation = self.evaluate_when_due(self.settings.eval.every)
                self.save_when_due()
                bar.update()
                bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
        if self.local_updates is not None:
            self.local_updates.finish()
            validation = None
        return self.evaluate() if validation is None else validation

    def compare_with_prediction(self, record: Mapping[str, Any]) -> None:
        """Where the scheme was chosen by prediction: say once whether its first steps take what was predicted."""
        if self.expectation is not None and self.rank == 0:
            verdict = self.expectation.see(record["step"], record["step_seconds"])
            if verdict is not None:
                tqdm.write(verdict, file=sys.stderr)

    def step(self, batches: Iterator[Tensor]) -> dict[str, Any]:
        """One optimizer step; returns its line of ``metrics.jsonl``."""
        if self.meter:
            self.meter.start()
        start = time.perf_counter()
        lr = set_learning_rate(self.optimizer, self.progress.step + 1, self.settings)
        own = list(islice(batches, self.micro_batches))
        self.progress.tokens += sum(map(self.task.tokens, own)) * self.comm.world_size
        losses: list[Tensor] = []

        def closure() -> float:
            losses.append(self.gradients(own))
            return float(losses[-1])

        if isinstance(self.handle, DFedSAM):  # evaluates them twice
            self.optimizer.step(closure)
        else:
            losses.append(self.gradients(own))
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        self.progress.step += 1
        stats = self.handle.last_step
        self.progress.tick()
        # The mean for the record is not part of the step: it is not timed, and counted nowhere.
        loss = self.mean_loss(losses[0])
        if self.meter:
            self.meter.stop(self.progress.step, stats.wire_bytes)
        exposed = stats.exposed_comm_seconds
        return {
            "step": self.progress.step,
            "loss": loss,
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
            "nonfinite": stats.nonfinite,
        }

    def mean_loss(self, local: Tensor) -> float:
        """Of all ranks, which hear on the way whether the time of any is up."""
        limit = self.settings.max_seconds
        late = limit is not None and self.progress.seconds >= limit
        both = self.sum_over_ranks(torch.stack([local, torch.full_like(local, late)]))
        total, latecomers = both.tolist()
        self.time_is_up = latecomers > 0
        return float(total / self.comm.world_size)

    def gradients(self, batches: Sequence[Tensor]) -> Tensor:
        """Forward and backward of this rank's share, clipped; gradients are sent with the last batch only.

        Returns the mean loss of the share, a float64 scalar.
        """
        self.optimizer.zero_grad()
        count = len(batches)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches):
            batch = batch.to(self.device)
            is_last = number == count - 1
            with nullcontext() if is_last else self.no_sync():
                with self.autocast():
                    loss = self.task.loss(self.model, batch) / count
                loss.backward()  # type: ignore[no-untyped-call]
                if is_last and self.after_backward:
                    self.after_backward()
            total += loss.detach()
        if not self.clips_in_step:
            self.clip()
        return total

    @property
    def clips_in_step(self) -> bool:
        """Whether gradients are clipped when the optimizer steps, and not before."""
        return isinstance(self.optimizer, PartitionedOptimizer)

    def clip(self) -> None:
        if self.settings.optim.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.optim.grad_clip)

    @property
    def micro_batches(self) -> int:
        """Backward passes before the optimizer steps: as the recipe says, or as AdLoCo does."""
        if isinstance(self.handle, AdLoCo):
            return self.handle.plan.accumulation
        return self.settings.batch.accumulate

    def no_sync(self) -> AbstractContextManager[None]:
        """Backward passes inside send nothing."""
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return sharding.no_sync(self.model)

    @property
    def module(self) -> nn.Module:
        """The model itself."""
        return getattr(self.model, "module", self.model)

    @property
    def local_updates(self) -> OuterSync | None:
        """The method, if replicas are on their own between rounds."""
        return self.handle if isinstance(self.handle, OuterSync) else None

    def autocast(self) -> torch.autocast:
        return autocast(self.device, self.settings.precision)

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
        """Means over all validation samples; ranks share the work and agree on the result. Inside a round of
        local updates each share is measured on its rank's own replica."""
        if self.local_updates is None:  # as DDP does before each step: rank 0's are the model's
            for buffer in self.module.buffers():
                self.comm.broadcast(buffer, src=0)
        mine = self.task.validation(self.rank, self.comm.world_size)
        if self.forward_is_collective:
            mine = self.as_many_for_all(mine)
        sums = measured(self.module, self.task, mine, self.device, self.settings.precision)
        validation = means_of(self.task, self.sum_over_ranks(sums))
        self.progress.tick()
        return validation

    @property
    def forward_is_collective(self) -> bool:
        """Whether ranks gather weights for each other in forward."""
        return isinstance(self.model, FSDPModule)

    def as_many_for_all(self, mine: Iterator[Tensor]) -> Iterator[Tensor]:
        """``mine``, and then empty batches, so that all ranks of a sharded model run forward equally often."""
        own = list(mine)
        count = torch.tensor([len(own)], device=self.device)
        most = int(self.comm.all_reduce(count, op="max"))
        some = next(iter(self.task.validation(0, 1)))
        yield from own
        yield from (some[:0] for _ in range(most - len(own)))

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        return self.comm.all_reduce(x, op="sum")

    def save_when_due(self) -> None:
        """Checkpoint at every multiple of ``checkpoint.every`` and at the last step."""
        step, every = self.progress.step, self.settings.checkpoint.every
        if self.ended or (every and step % every == 0):
            self.finish_save()
            checkpoint, contents = self.run.checkpoint(step), self.checkpoint_contents()
            if self.settings.checkpoint.asynchronous and not self.ended:
                self.pending_save = commkit.checkpoint.save_async(checkpoint, **contents)
                return
            commkit.checkpoint.save(checkpoint, **contents)
            self.prune()

    def finish_save(self) -> None:
        """Wait for a checkpoint that is being written."""
        if self.pending_save is not None:
            self.pending_save.result()
            self.pending_save = None
            self.prune()

    def prune(self) -> None:
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
        weights: dict[str, Any] = {"model": self.module, "optimizer": self.optimizer}
        replicated: dict[str, Any] = {"progress": self.progress}
        per_rank: dict[str, Any] = {"random_state": self.random_state}
        if self.local_updates is None:
            replicated |= weights
        else:  # replicas differ inside a round, and inner optimizers always
            per_rank |= weights | {"replica": self.local_updates.replica_state}
            replicated["method"] = self.local_updates
        if self.sharded is not None:
            replicated["method"] = self.sharded.method
        return {
            "replicated": replicated,
            "per_rank": per_rank,
            "reducer": (self.handle if self.sharded is None else self.sharded).reducer,
            "comm": self.comm,
        }


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """bf16 if ``precision`` says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def measured(
    model: nn.Module,
    task: Task,
    batches: Iterator[Tensor],
    device: torch.device,
    precision: Precision,
) -> Tensor:
    """Over validation batches: the sum of each of the task's metrics, then the number of samples; float64."""
    model.eval()
    sums = torch.zeros(len(task.metrics) + 1, dtype=torch.float64, device=device)
    for batch in batches:
        with autocast(device, precision):
            means = task.measure(model, batch.to(device))
        if batch.shape[0]:  # the mean of none is no number
            sums[:-1] += means * batch.shape[0]
        sums[-1] += batch.shape[0]
    model.train()
    return sums


def means_of(task: Task, sums: Tensor) -> dict[str, float]:
    """The task's metrics from what :func:`measured` gave for all samples."""
    *totals, count = sums.tolist()
    return {name: total / count for name, total in zip(task.metrics, totals, strict=True)}

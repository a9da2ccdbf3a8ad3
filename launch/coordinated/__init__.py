"""Training with a coordinator: some ranks hold the weights, the others compute gradients in rounds.

Scheme and records are those of any other run; ``docs`` of each are in :mod:`commkit.straggler`. A step's batch is
``batch.per_rank * batch.accumulate`` samples per worker, the very samples that plain training with as many ranks
reads in that step. Losses are of the whole batch, as far as it is in the gradient. Rank 0 has to be the first
coordinator: it validates, and writes records and checkpoints; workers add what they have left unsent.
"""

import copy
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

import commkit
from commkit.metrics import MetricsSink, finite
from commkit.schemes import make_scheme
from commkit.straggler import (
    Coordinator,
    DynamicBackup,
    Share,
    StepRecord,
    StragglerScheme,
    Worker,
)
from commkit.straggler.rounds import Rounds
from commkit.structure import flatten, unflatten
from commkit.transport import Network
from launch import baselines
from launch.gpt import count_parameters
from launch.optimizer import make_optimizer
from launch.progress import Progress
from launch.schedule import learning_rate
from launch.settings import TrainSettings
from launch.sinks import open_sinks
from launch.world import LauncherWatch

if TYPE_CHECKING:
    from launch.train import Job

_UNDER_MPIRUN = "OMPI_COMM_WORLD_SIZE"


def concerns(settings: TrainSettings) -> bool:
    """Whether the scheme has a coordinator."""
    return _scheme(settings) is not None


def _scheme(settings: TrainSettings) -> StragglerScheme | None:
    if baselines.is_baseline(settings.scheme):
        return None
    made = make_scheme(settings.scheme)
    return made if isinstance(made, StragglerScheme) else None


class Samples:
    """The task's training samples by their number in the run, in the order of plain training."""

    def __init__(self, job: "Job") -> None:
        self.loader = job.task.loader(0, 1)  # whose position is not used
        self._data, self._order = self.loader.dataset, self.loader.batch_sampler
        self._device = job.device

    def __getitem__(self, numbers: range) -> Tensor:
        rows = [self._data[self._order.start_of(number)] for number in numbers]
        return torch.stack(rows).to(self._device)


@dataclass
class CoordinatedRun:
    """This rank's part of a run, coordinator or worker."""

    job: "Job"
    scheme: StragglerScheme
    network: Network
    models: list[nn.Module]
    optimizers: list[Optimizer]
    batch: int
    coordinator: Coordinator | None = None
    worker: Worker | None = None
    sinks: list[MetricsSink] = field(default_factory=list)
    validation_sinks: list[MetricsSink] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.samples = Samples(self.job)
        self.progress = Progress(self.samples.loader, self.job.task.digest)
        self._open: dict[int, list[StepRecord]] = {}  # records of a step, by model
        self._sent = (0, 0, 0, 0.0)
        self._bar: tqdm[Any] | None = None
        self._watch = LauncherWatch()

    @property
    def settings(self) -> TrainSettings:
        return self.job.settings

    @property
    def leads(self) -> bool:
        return self.coordinator is not None and self.coordinator.is_first

    def run(self) -> None:
        """To the end, with summary and checkpoints."""
        if self.worker is not None:
            self.work(self.worker)
        else:
            assert self.coordinator is not None
            self.lead(self.coordinator)
        if dist.is_initialized():
            dist.destroy_process_group()

    # Workers.

    def work(self, worker: Worker) -> None:
        """Compute until the coordinator has had enough."""
        settings, task, model = self.settings, self.job.task, worker.model

        def loss_of(share: Share) -> Tensor | None:
            self._watch.check()
            with torch.random.fork_rng(enabled=settings.model.dropout > 0):
                if settings.model.dropout > 0:  # the same masks wherever this share is computed
                    torch.manual_seed(share.seed)
                with torch.autocast(
                    self.job.device.type, torch.bfloat16, enabled=settings.precision == "bf16"
                ):
                    return task.loss(model, self.samples[share.samples])

        with worker:
            worker.run(loss_of)
        self.save_worker(settings.steps)

    def save_worker(self, step: int) -> None:
        """What this worker has left unsent, into the checkpoint of that step, if it is still there."""
        directory, rank = self.job.run.checkpoint(step), self.network.rank
        if self.worker is None or not directory.is_dir():
            return
        _write(directory / f"worker_{rank:06d}.pt", self.worker.state_dict())

    def load_worker(self, worker: Worker) -> None:
        """Its own residual, or with another number of workers the mean of all."""
        newest = self.newest_checkpoint()
        if newest is None:
            return
        saved = sorted(newest.glob("worker_*.pt"))
        own = newest / f"worker_{self.network.rank:06d}.pt"
        if _read(newest / "coordinator_000000.pt")["workers"] == len(worker.party.workers):
            if own.is_file():
                worker.load_state_dict(_read(own))
            else:
                print(
                    f"rank {self.network.rank}: {newest} lacks {own.name}, which was late; what it held is lost",
                    flush=True,
                )
        elif saved:
            worker.load_state_dict(_mean([_read(file) for file in saved]))

    # Coordinators.

    def lead(self, coordinator: Coordinator) -> None:
        """Hand out weights and collect gradients; on rank 0 also all that is written."""
        settings = self.settings
        with coordinator:
            if self.leads:
                self.job.run.prepare(settings.model_dump(mode="json"), self.progress.step)
                self.sinks, self.validation_sinks = open_sinks(self.job.run, self.settings)
                print(self.describe(), flush=True)
            self._bar = tqdm(
                total=settings.steps,
                initial=self.progress.step,
                desc=settings.scheme["name"],
                unit="step",
                disable=not self.leads,
                mininterval=0.5,
            )
            self.progress.tick()
            if self.job.meter:
                self.job.meter.start()
            with self._bar:
                coordinator.run(settings.steps * len(self.models), self.on_step, self.whole_at)
        if self.leads:
            validation = self.evaluate()
            print(self.job.run.write_summary(self.facts(coordinator, validation)), flush=True)
            for sink in {*self.sinks, *self.validation_sinks}:
                sink.close()

    def whole_at(self, job: int) -> bool:
        """Whether rank 0 needs all weights after this job: to validate."""
        every, step = self.settings.eval.every, job // len(self.models) + 1
        return bool(every) and step % every == 0 and (job + 1) % len(self.models) == 0

    def on_step(self, record: StepRecord) -> None:
        """A job is finished; with the last model's, a step."""
        self._watch.check()
        records = self._open.setdefault(record.step, [])
        records.append(record)
        if len(records) < len(self.models):
            return
        del self._open[record.step]
        self.progress.step += 1
        self.count_tokens(records)
        self.progress.tick()
        if self.leads:
            line = finite(self.line(records))
            for sink in self.sinks:
                sink.write(line)
            if self.job.meter:
                self.job.meter.stop(self.progress.step, line["wire_bytes"])
            self.evaluate_when_due()
        self.save_when_due()
        if self._bar is not None:
            self._bar.update()
        if self.job.meter:
            self.job.meter.start()

    def line(self, records: list[StepRecord]) -> dict[str, Any]:
        """A step's line of ``metrics.jsonl``: bytes that rank 0 has sent; what the median worker waited is
        exposed."""
        coordinator = self.coordinator
        assert coordinator is not None
        sent = coordinator.transport.sent
        now = (sent.payload_bytes, sent.wire_bytes, sent.rounds, sent.seconds)
        payload, wire, rounds, seconds = (b - a for a, b in zip(self._sent, now, strict=True))
        self._sent = now
        took = sum(record.step_seconds for record in records)
        waited = sum(max(0.0, record.seconds - record.compute_seconds) for record in records)
        alive = len(coordinator.party.workers) - len(coordinator.stats.lost_workers)
        parameters = coordinator.party.parameters.values()
        dense = sum(p.numel() * p.element_size() for p in parameters) * alive * len(records)
        return {
            "step": self.progress.step,
            "loss": sum(record.loss for record in records) / len(records),
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "tokens": self.progress.tokens,
            "step_seconds": took,
            "compute_seconds": max(0.0, took - waited),
            "exposed_comm_seconds": waited,
            "comm_seconds": seconds,
            "reduce_seconds": sum(record.seconds for record in records),
            "dense_bytes": dense,
            "payload_bytes": payload,
            "wire_bytes": wire,
            "rounds": rounds,
            "residual_norm": coordinator.residual_norm,
            "num_contributors": min(len(record.contributors) for record in records),
            "nonfinite": any(record.skipped for record in records),
        }

    def count_tokens(self, records: list[StepRecord]) -> None:
        assert self.coordinator is not None
        workers = len(self.coordinator.party.workers)
        per_sample = self.job.task.tokens(self.samples[range(1)])
        for record in records:
            share = len(record.contributors) / workers if record.awaited is not None else 1.0
            self.progress.tokens += round(share * self.batch) * per_sample * (not record.skipped)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Means over all validation samples and models, on this rank alone."""
        task = self.job.task
        assert self.coordinator is not None
        self.coordinator.write_buffers()
        sums = torch.zeros(len(task.metrics) + 1, dtype=torch.float64)
        for model in self.models:
            model.eval()
            for batch in task.validation(0, 1):
                means = task.measure(model, batch.to(self.job.device)).cpu()
                sums[:-1] += means * batch.shape[0]
                sums[-1] += batch.shape[0]
            model.train()
        *totals, count = sums.tolist()
        self.progress.tick()
        return {name: total / count for name, total in zip(task.metrics, totals, strict=True)}

    def evaluate_when_due(self) -> None:
        every = self.settings.eval.every
        if every and self.progress.step % every == 0:
            validation = self.evaluate()
            for sink in self.validation_sinks:
                sink.write(finite({"step": self.progress.step, **validation}))

    def save_when_due(self) -> None:
        """Each coordinator's part, and a request to the workers to add theirs before they compute the next round."""
        step, every, run = self.progress.step, self.settings.checkpoint.every, self.job.run
        if step != self.settings.steps and not (every and step % every == 0):
            return
        assert self.coordinator is not None
        directory = run.checkpoint(step)
        partial = directory.with_name(directory.name + ".partial")
        target = partial if self.leads else directory
        target.mkdir(parents=True, exist_ok=True)
        state = {
            "coordinator": self.coordinator.state_dict(),
            "progress": self.progress.state_dict(),
        }
        workers = len(self.coordinator.party.workers)
        _write(target / f"coordinator_{self.network.rank:06d}.pt", {**state, "workers": workers})
        if self.leads:
            if directory.is_dir():  # another coordinator was faster
                for file in partial.iterdir():
                    file.rename(directory / file.name)
                partial.rmdir()
            else:
                partial.rename(directory)
            self.coordinator.save_workers(step)
            run.prune_checkpoints()

    def load(self, coordinator: Coordinator) -> None:
        """Continue from the newest complete checkpoint of the run, or from the start."""
        newest = self.newest_checkpoint()
        if newest is None:
            return
        state = _read(newest / f"coordinator_{self.network.rank:06d}.pt")
        saved_by, workers = state["workers"], len(coordinator.party.workers)
        if saved_by != workers and self.settings.checkpoint.on_world_size_change == "error":
            raise ValueError(
                f"--resume: {newest} was saved with {saved_by} workers and there are {workers}; start as many, or say "
                "--set checkpoint.on_world_size_change=mean"
            )
        self.progress.load_state_dict(state["progress"])
        job = self.progress.step * len(self.models)
        coordinator.load_state_dict(state["coordinator"], job)

    def newest_checkpoint(self) -> Path | None:
        """The newest one in which every coordinator has its part."""
        names = [f"coordinator_{rank:06d}.pt" for rank in self.scheme.options.coordinators]
        complete = [
            directory
            for directory in self.job.run.complete_checkpoints()
            if all((directory / name).is_file() for name in names)
        ]
        return complete[-1] if complete else None

    def describe(self) -> str:
        """One line: what is about to run."""
        assert self.coordinator is not None
        coordinators = len(self.scheme.options.coordinators)
        workers = len(self.coordinator.party.workers)
        return (
            f"{self.settings.scheme['name']}: {count_parameters(self.models[0]):,} parameters, "
            f"{coordinators} coordinator{'s' * (coordinators > 1)} and {workers} worker{'s' * (workers > 1)} "
            f"over {self.scheme.transport}, {self.job.task.headline()}, step {self.progress.step} of "
            f"{self.settings.steps}, into {self.job.run.path}"
        )

    def facts(self, coordinator: Coordinator, validation: Mapping[str, float]) -> dict[str, Any]:
        """What ``summary.json`` says besides the totals of the per-step records."""
        stats = coordinator.stats
        return {
            "scheme": self.settings.scheme["name"],
            "world_size": self.network.world_size,
            "workers": len(coordinator.party.workers),
            "transport": self.scheme.transport,
            "steps": self.progress.step,
            "parameters": count_parameters(self.models[0]),
            "buffer_bytes": sum(b.numel() * b.element_size() for b in self.models[0].buffers()),
            "device": self.job.device.type,
            "task": self.settings.task,
            "data": self.job.task.describe(),
            **validation,
            "wall_seconds": self.progress.seconds,
            "rounds": stats.rounds,
            "skipped_jobs": stats.skipped,
            "lost_workers": stats.lost_workers,
            "drop_rates": {str(r): stats.drop_rate(r) for r in coordinator.party.workers},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "commkit": commkit.__version__,
            },
        }


def set_up(job: "Job") -> CoordinatedRun:
    """Join the other ranks, and build this one's part.

    Raises:
        ValueError, TypeError, RuntimeError, ModuleNotFoundError: what the user asked for cannot be had.
    """
    settings, scheme = job.settings, _scheme(job.settings)
    assert scheme is not None
    size = job.world.size
    if scheme.transport == "mpi":
        if _UNDER_MPIRUN not in os.environ:
            raise ValueError(
                "scheme.transport: got 'mpi', but these ranks were not started by mpirun; use launch/mpirun.sh, or "
                "say --set scheme.transport=torch"
            )
        size = int(os.environ[_UNDER_MPIRUN])
    rounds, batch = check(settings, scheme, size)
    if scheme.transport == "torch":
        job.world.join(job.device)
    network = scheme.network()
    count = rounds.delay + 1 if scheme.options.interleave == "models" else 1
    models = [build(job, number).to(job.device) for number in range(count)]
    made = CoordinatedRun(job, scheme, network, models, [], batch)
    if network.rank not in scheme.options.coordinators:
        made.worker = scheme.work(models[0], batch=batch, network=network, on_save=made.save_worker)
        worker = made.worker.start()
        if job.resume:
            made.load_worker(worker)
        return made
    made.optimizers = [make_optimizer(model, settings) for model in models]

    def set_rate(model: int, step: int) -> None:
        rate = learning_rate(step + 1, settings.optim.lr, settings.schedule)
        for group in made.optimizers[model].param_groups:
            group["lr"] = rate

    made.coordinator = scheme.coordinate(
        models,
        made.optimizers,
        batch=batch,
        max_grad_norm=settings.optim.grad_clip,
        before_step=set_rate,
        network=network,
    )
    coordinator = made.coordinator.start()
    if job.resume:
        made.load(coordinator)
    return made


def check(settings: TrainSettings, scheme: StragglerScheme, size: int) -> tuple[Rounds, int]:
    """The scheme for so many ranks, and its batch, before any of them has met another.

    Raises:
        ValueError: settings that do not go together.
    """
    if scheme.options.coordinators[0] != 0:
        raise ValueError(
            f"scheme.options.coordinators: got {list(scheme.options.coordinators)}, but rank 0 writes the records and "
            "has to be the first; say [0]"
        )
    method = scheme.method
    if (
        isinstance(method, DynamicBackup)
        and method.gain == "smoothness"
        and (settings.optim.name != "sgd" or settings.optim.momentum)
    ):
        raise ValueError(
            "scheme.gain: got 'smoothness', which holds for SGD without momentum, with "
            f"optim.name={settings.optim.name} and optim.momentum={settings.optim.momentum:g}; say "
            "--set scheme.gain=noise_scale"
        )
    workers = len(scheme.options.workers(size))
    rounds = method.build(workers)
    per_rank, accumulate = settings.batch.per_rank, settings.batch.accumulate
    batch, units = per_rank * accumulate * workers, rounds.num_units
    if batch % units:
        step = units // math.gcd(units, accumulate * workers)
        raise ValueError(
            f"batch.per_rank: got {per_rank}, which with batch.accumulate={accumulate} and {workers} workers is a batch of "
            f"{batch}, but {settings.scheme['name']} cuts it into {units} equal parts; say "
            f"--set batch.per_rank={-(-per_rank // step) * step}"
        )
    return rounds, batch


def build(job: "Job", number: int) -> nn.Module:
    """The task's model; the first one as ever, further ones from other seeds."""
    if not number:
        return job.task.build()
    task: Any = copy.copy(job.task)
    task.settings = job.settings.model_copy(update={"seed": job.settings.seed + number})
    model: nn.Module = task.build()
    return model


def _write(path: Path, state: Mapping[str, Any]) -> None:
    """Plain tensors, nothing pickled; a reader sees all of it or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(flatten(state), temporary)
    temporary.replace(path)


def _read(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = unflatten(torch.load(path, weights_only=True, map_location="cpu"))
    return state


def _mean(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One worker state of many: residuals are averaged, absent ones counting as zero."""
    slots: dict[str, dict[str, Tensor]] = {}
    for state in states:
        for slot, residuals in state["residuals"].items():
            mean = slots.setdefault(slot, {})
            for name, x in residuals.items():
                mean[name] = mean.get(name, torch.zeros_like(x)) + x / len(states)
    return {"residuals": slots, "saved": max(state["saved"] for state in states)}

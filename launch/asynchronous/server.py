"""Asynchronous local SGD from a recipe: ``scheme: {name: async_local_sgd, servers: [0]}``.

The ranks in ``servers`` hold the weights, the others train, each on the shard of the data and for as many steps as it is
told; see :mod:`commkit.outer.async_local_sgd`. ``steps`` of the recipe are inner steps per worker, on average: fast
workers do more of them. The learning rate follows the steps of the shard that is trained on.

The first server writes the run's files. ``metrics.jsonl`` has one object for each such step, as for other schemes;
since the server hears of several steps at once, their loss is the mean over a worker's task, and seconds and bytes
are those between two pushes in equal parts. Bytes are what the server sends, weights on their way down. Validation
and checkpoints hold up everybody while they last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

import commkit
from commkit.comm import DistComm, new_group_like
from commkit.metrics import MetricsSink, finite
from commkit.outer import AsyncScheme, AsyncServer, AsyncWorker
from commkit.outer.async_local_sgd import PushRecord
from commkit.schemes import make_scheme
from launch import baselines
from launch.gpt import count_parameters
from launch.loop import autocast, measured
from launch.optimizer import make_optimizer
from launch.rundir import software
from launch.schedule import learning_rate
from launch.settings import TrainSettings
from launch.sinks import open_sinks
from launch.tasks import Task
from launch.world import LauncherWatch

if TYPE_CHECKING:
    from launch.train import Job


def scheme_of(settings: TrainSettings) -> AsyncScheme | None:
    """The recipe's scheme if it is this one.

    Raises:
        ConfigError: unknown scheme or field, or a value out of range.
    """
    if baselines.is_baseline(settings.scheme):
        return None
    made = make_scheme(settings.scheme)
    return made if isinstance(made, AsyncScheme) else None


def set_up(job: Job, scheme: AsyncScheme) -> Server | Worker:
    """Join the other ranks and take a role.

    Raises:
        ValueError, RuntimeError: ranks that do not fit, or do not agree.
    """
    torch.manual_seed(job.settings.seed + job.world.rank)
    scheme.options.workers(job.world.size)
    if job.settings.eval.every and len(scheme.options.servers) > 1:
        raise ValueError(
            f"eval.every={job.settings.eval.every}: each of servers={list(scheme.options.servers)} holds a part of the "
            "model, so it is evaluated at the end only; use eval.every=0, or one server"
        )
    job.world.join(job.device)
    model = job.task.build().to(job.device)
    if scheme.serves(job.world.rank):
        return Server(job, scheme.server(model))
    optimizer = make_optimizer(model, job.settings)
    return Worker(job, scheme.worker(model, optimizer), optimizer)


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
                lr = learning_rate(worker.shard_step + 1, settings.optim.lr, settings.schedule)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
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
            with autocast(device, self.job.settings):
                loss = self.job.task.loss(self.worker.model, batch.to(device)) / len(batches)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total


@dataclass
class Position:
    """How far a run has come, for its checkpoints."""

    digest: str
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: the run began with other data.
        """
        if state["digest"] != self.digest:
            raise ValueError(
                f"--resume: the data has digest {self.digest}, but the run began with {state['digest']}; restore the "
                "data or give another --out"
            )
        vars(self).update(state)


@dataclass
class _Spent:
    """Since the last record."""

    bytes_before: tuple[int, int, int] = (0, 0, 0)
    since: float = field(default_factory=time.perf_counter)
    steps: int = 0
    worker_seconds: float = 0.0
    loss_sum: float = 0.0
    pushes: int = 0


class Server:
    """A rank that holds weights, or a part of them.

    Args:
        job: what is to be done.
        server: not started.
    """

    def __init__(self, job: Job, server: AsyncServer) -> None:
        self.job, self.server = job, server
        self.writes = server.party.rank == server.party.first
        self.position = Position(job.task.digest)
        (batch,) = Shards(job.task, 1, 1).batches(0, 0)
        self.tokens_per_step = job.task.tokens(batch) * job.settings.batch.accumulate
        self.dense_bytes = sum(
            p.numel() * p.element_size() for p in server.party.parameters.values()
        )
        self.reducer = commkit.schemes.ddp()  # checkpoints hold one; this has no state
        self.sinks: list[MetricsSink] = []
        self.validation_sinks: list[MetricsSink] = []
        self._watch = LauncherWatch()
        self._spent = _Spent()
        self._bar: tqdm[Any] | None = None
        self._comm: DistComm | None = None  # among the servers

    def train(self) -> None:
        """Serve until all steps are done, and write what there is to write."""
        settings, run = self.job.settings, self.job.run
        workers = len(self.server.party.workers)
        with self.server as server:
            # Now, not before: torch names a group by how many there are, which is the same on all ranks until here.
            party = server.party
            self._comm = DistComm(new_group_like(party.group, None, party.options.servers))
            if self.job.resume:
                self.load()
            if self.writes:
                run.prepare(settings.model_dump(mode="json"), self.position.step)
                self.sinks, self.validation_sinks = open_sinks(run, settings)
                print(self.describe(), flush=True)
            if self.job.meter:
                self.job.meter.start()
            total, done, name = settings.steps, self.position.step, settings.scheme["name"]
            self._spent = _Spent(self._sent())
            with tqdm(
                total=total, initial=done, desc=name, unit="step", disable=not self.writes
            ) as bar:
                self._bar = bar
                server.serve(steps=settings.steps * workers, on_push=self.on_push)
            self.gather()
            validation = self.evaluate() if self.writes else {}
            self.save()
        if self.writes:
            if settings.eval.every:
                self.validated(validation)
            print(run.write_summary(self.facts(validation)), flush=True)
            for sink in {*self.sinks, *self.validation_sinks}:
                sink.close()
        leave()

    def on_push(self, push: PushRecord) -> None:
        """Note what was pushed; write the records of the steps that this completes."""
        self._watch.check()
        spent = self._spent
        spent.pushes += 1
        spent.steps += push.steps
        spent.loss_sum += (math.nan if push.loss is None else push.loss) * push.steps
        spent.worker_seconds += push.seconds
        workers = len(self.server.party.workers)
        reached = min(self.job.settings.steps, self.server.stats.steps // workers)
        before = self.position.step
        if reached == before:
            return
        records = self.records(reached)
        self.position.step = reached
        self.position.tokens = records[-1]["tokens"]
        for sink in self.sinks:
            for record in records:
                sink.write(finite(record))
        if self._bar is not None:
            self._bar.update(reached - before)
            self._bar.set_postfix(loss=f"{records[-1]['loss']:.3f}", refresh=False)
        every = self.job.settings.eval.every
        if every and reached // every > before // every and reached < self.job.settings.steps:
            self.server.write_back()
            self.validated(self.evaluate())
        every = self.job.settings.checkpoint.every
        if every and reached // every > before // every:
            self.save()
        self._spent = _Spent(self._sent())

    def records(self, reached: int) -> list[dict[str, Any]]:
        """Of all steps up to ``reached``, counted from 1, that have none yet."""
        spent, now = self._spent, time.perf_counter()
        first, count = self.position.step + 1, reached - self.position.step
        elapsed = now - spent.since
        self.position.seconds += elapsed
        sent = [b - a for a, b in zip(spent.bytes_before, self._sent(), strict=True)]
        if self.job.meter:
            self.job.meter.stop(reached, sent[1])
            self.job.meter.start()
        settings = self.job.settings
        workers = len(self.server.party.workers)
        return [
            {
                "step": first + place,
                "loss": spent.loss_sum / spent.steps,
                "lr": learning_rate(first + place, settings.optim.lr, settings.schedule),
                "tokens": (first + place) * workers * self.tokens_per_step,
                "step_seconds": elapsed / count,
                "compute_seconds": spent.worker_seconds / spent.steps,
                "exposed_comm_seconds": None,
                "comm_seconds": None,
                "reduce_seconds": None,
                "dense_bytes": _part(spent.pushes * self.dense_bytes, count, place),
                "payload_bytes": _part(sent[0], count, place),
                "wire_bytes": _part(sent[1], count, place),
                "rounds": _part(sent[2], count, place),
                "residual_norm": None,
                "num_contributors": 1,
                "nonfinite": None,
            }
            for place in range(count)
        ]

    def _sent(self) -> tuple[int, int, int]:
        sent = self.server.transport.sent
        return sent.payload_bytes, sent.wire_bytes, sent.rounds

    def gather(self) -> None:
        """Bring all servers' parts of the final weights to the first one, whose model is then whole."""
        party = self.server.party
        for rank in party.others:
            for name in party.parts[rank]:
                p = party.parameters[name].detach()
                if party.rank == party.first:
                    dist.recv(p, src=rank)
                elif party.rank == rank:
                    dist.send(p.contiguous(), dst=party.first)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Means over all validation samples, of the model as it is here."""
        task, settings = self.job.task, self.job.settings
        sums = measured(self.server.model, task, task.validation(0, 1), self.job.device, settings)
        *totals, count = sums.tolist()
        self._spent.since = time.perf_counter()
        return {name: total / count for name, total in zip(task.metrics, totals, strict=True)}

    def validated(self, validation: Mapping[str, float]) -> None:
        """Write an evaluation down."""
        for sink in self.validation_sinks:
            sink.write(finite({"step": self.position.step, **validation}))

    def save(self) -> None:
        """A checkpoint of the servers: workers begin anew after a resumption, on the shards where these were."""
        run = self.job.run
        commkit.checkpoint.save(run.checkpoint(self.position.step), **self.contents())
        if self.writes:
            run.prune_checkpoints()

    def load(self) -> None:
        """Continue from the newest complete checkpoint of the run, or from the start.

        Raises:
            ValueError: saved by another number of servers, or on other data.
        """
        newest = commkit.checkpoint.latest(self.job.run.checkpoints)
        if newest is not None:
            commkit.checkpoint.load(newest, **self.contents(), on_resize="error")

    def contents(self) -> dict[str, Any]:
        return {
            "replicated": {"position": self.position},
            "per_rank": {"server": self.server},
            "reducer": self.reducer,
            "comm": self._comm,
        }

    def describe(self) -> str:
        """One line: what is about to run."""
        party, settings = self.server.party, self.job.settings
        return (
            f"{settings.scheme['name']}: {count_parameters(self.server.model):,} parameters, "
            f"{len(party.workers)} workers and {1 + len(party.others)} servers on {self.job.device.type}, "
            f"{self.job.task.headline()}, step {self.position.step} of {settings.steps}, into {self.job.run.path}"
        )

    def facts(self, validation: Mapping[str, float]) -> dict[str, Any]:
        """What ``summary.json`` says besides the totals of the records."""
        model, stats = self.server.model, self.server.stats
        return {
            "scheme": self.job.settings.scheme["name"],
            "world_size": self.job.world.size,
            "steps": self.position.step,
            "parameters": count_parameters(model),
            "buffer_bytes": sum(b.numel() * b.element_size() for b in model.buffers()),
            "device": self.job.device.type,
            "task": self.job.settings.task,
            "data": self.job.task.describe(),
            **validation,
            "wall_seconds": self.position.seconds,
            "workers": len(self.server.party.workers),
            "pushes": stats.pushes,
            "mean_staleness": stats.mean_staleness,
            "lost_workers": list(stats.lost_workers),
            "versions": software(),
        }


def leave() -> None:
    """Let torch end this process without complaint."""
    dist.destroy_process_group()


def _part(total: int, count: int, place: int) -> int:
    """Place ``place`` of ``count`` nearly equal parts of ``total``, which add up to it."""
    return total * (place + 1) // count - total * place // count

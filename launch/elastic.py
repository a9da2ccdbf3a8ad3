"""A run whose workers may be lost and joined by others: ``elastic: {min_workers: 2}`` in a recipe.

    python -m launch.members --nproc 4 launch/train.py --config configs/powersgd.yaml --set elastic.min_workers=2

For schemes that reduce at every step and for the methods with local updates that :class:`commkit.Elastic` serves. Data goes
on with the shares of those who are left. The loss in the records is that of rank 0's share, as the mean would be one more
thing to do together; when rank 0 is lost, the next one writes them. Below ``min_workers`` the others save a checkpoint and
end with status 3 each; ``--resume`` goes on from it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

import commkit
from commkit import Elastic, ElasticOptions
from commkit.checkpoint import CheckpointError
from commkit.comm import CollectiveError, DistComm
from commkit.membership import TrainingStopped
from commkit.metrics import finite
from commkit.outer import OuterScheme
from commkit.schemes import make_scheme
from launch import baselines, sharding
from launch.loop import Trainer
from launch.optimizer import make_optimizer
from launch.settings import TrainSettings
from launch.sinks import open_sinks
from launch.world import LauncherWatch

if TYPE_CHECKING:
    from launch.train import Job

T = TypeVar("T")
STOPPED = 3  # exit status of a run with too few workers


def check(settings: TrainSettings) -> None:
    """
    Raises:
        ValueError: a recipe that cannot be elastic.
    """
    if settings.elastic is None:
        return
    name = settings.scheme["name"]
    refusals = {
        f"scheme {name!r} is torch's own": baselines.is_baseline(settings.scheme),
        "max_seconds needs all workers": settings.max_seconds is not None,
        "checkpoint.asynchronous keeps a group of its own": settings.checkpoint.asynchronous,
        "device: cuda needs NCCL, whose collectives end otherwise": settings.device == "cuda",
    }
    for reason, refused in refusals.items():
        if refused:
            raise ValueError(f"elastic: {reason}; leave it out, or elastic")
    if sharding.is_sharded(settings):
        raise ValueError(
            f"elastic: scheme {name!r} shards the model, and a lost worker's shards are nowhere else; use a scheme for "
            "replicas, such as powersgd, or leave elastic out and --resume after a loss"
        )
    made = make_scheme(settings.scheme)
    if isinstance(made, commkit.straggler.StragglerScheme | commkit.outer.AsyncScheme):
        raise ValueError(
            f"elastic: the ranks of scheme {name!r} have roles, and it goes on without lost workers by itself; leave "
            "elastic out"
        )
    ElasticOptions(**settings.elastic.model_dump())


def join(job: Job) -> Elastic:
    """
    Raises:
        ValueError: the launcher does not say where the others are.
    """
    assert job.settings.elastic is not None
    commkit.membership.Place.from_environment()
    return Elastic(ElasticOptions(**job.settings.elastic.model_dump()))


def set_up(job: Job, members: Elastic) -> ElasticTrainer:
    """Model, optimizer and scheme; nothing collective, as a worker that joins later does it alone.

    Raises:
        ValueError, TypeError, RuntimeError: what does not go together.
    """
    settings = job.settings
    torch.manual_seed(settings.seed + job.world.rank)  # dropout: different masks on each rank
    model = job.task.build()
    optimizer = make_optimizer(model, settings)
    debug = commkit.Debug(**settings.debug.model_dump())
    handle = baselines.attach(model, optimizer, settings.scheme, None, debug, members)
    newest = commkit.checkpoint.latest(job.run.checkpoints) if job.resume else None
    trainer = ElasticTrainer(
        settings=settings,
        model=model,
        optimizer=optimizer,
        handle=handle,
        loader=job.task.loader(members.rank, members.world_size),
        task=job.task,
        device=torch.device("cpu"),
        run=job.run,
        meter=job.meter,
        members=members,
        first=_First(0 if newest is None else int(newest.name.removeprefix("step_"))),
    )
    if not isinstance(make_scheme(settings.scheme), OuterScheme):
        # After the reduction, which is registered.
        optimizer.register_step_pre_hook(lambda *_: trainer.clip())
    return trainer


def train(trainer: ElasticTrainer) -> None:
    """Run to the end and write the summary; with too few workers, save and end."""
    from launch.train import facts  # which imports this file

    try:
        validation = trainer.train(LauncherWatch())
    except TrainingStopped as stop:
        trainer.save_remaining()
        print(f"stopped: {stop}", file=sys.stderr, flush=True)
        raise SystemExit(STOPPED) from stop
    if trainer.members.rank == 0:
        print(trainer.run.write_summary(facts(trainer, validation)), flush=True)
        for sink in {*trainer.sinks, *trainer.validation_sinks}:
            sink.close()
    if trainer.local_updates is not None:  # it has finished, and some may have left
        trainer.local_updates.close(finish=False)
    else:
        trainer.handle.close()


class _First:
    """The step that the run begins with, as a worker that joins hears of it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


@dataclass
class ElasticTrainer(Trainer):
    """The loop, each of whose steps is made as often as it takes.

    ``first`` is the step of the checkpoint that is loaded.
    """

    members: Elastic = None  # type: ignore[assignment]
    first: _First = None  # type: ignore[assignment]

    def train(self, watch: LauncherWatch) -> dict[str, float]:
        """See :meth:`Trainer.train`."""
        epoch, validation = 0, None
        batches: Iterator[Tensor] = iter(())
        state: dict[str, Any] = {
            "begins": self.first,
            "model": self.module,
            "optimizer": self.optimizer,
            "progress": self.progress,
        }
        for step in self.members.steps(self.settings.steps, first=self.first.step, **state):
            watch.check()
            while step.number == self.first.step and not self.begin():
                self.members.catch_up()
            self.progress.step = step.number  # a worker may have joined in the middle of one
            if self.members.epoch != epoch:
                epoch, batches = self.members.epoch, self.dealt_anew()
            before = self.progress.state_dict()
            with step:
                record = self.step(batches)
            if self.progress.step == step.number:  # given up
                self.progress.load_state_dict(before)
                epoch = 0
                continue
            self.write(record)
            validation = self.evaluate_when_due(self.settings.eval.every)
            self.save_when_due()
        if self.local_updates is not None:
            self.local_updates.finish()
            validation = None
        return validation or self.evaluate_at_the_end()

    def begin(self) -> bool:
        """Load the checkpoint if any; all do, whenever they come to the first step. False: a worker was lost meanwhile."""
        if self.first.step and self.together(self.load_all) is None:
            return False
        return True

    def load_all(self) -> bool:
        super().load()
        return True

    def dealt_anew(self) -> Iterator[Tensor]:
        """Data from here on, of this rank's share among those who are there now."""
        position = self.progress.state_dict()
        self.loader = self.task.loader(self.members.rank, self.members.world_size)
        self.progress.loader = self.loader
        self.progress.load_state_dict(position)
        return iter(self.loader)

    @property
    def rank(self) -> int:
        return self.members.rank

    @property
    def clips_in_step(self) -> bool:
        return self.local_updates is None

    def mean_loss(self, local: Tensor) -> float:
        return float(local)

    def write(self, record: dict[str, Any]) -> None:
        """On rank 0, which takes the records over when it has become that."""
        if self.rank != 0:
            return
        if not self.sinks:
            self.run.prepare(self.settings.model_dump(mode="json"), self.progress.step - 1)
            self.sinks, self.validation_sinks = open_sinks(self.run, self.settings)
        for sink in self.sinks:
            sink.write(finite(record | {"workers": self.members.world_size}))

    def together(self, action: Callable[[], T]) -> T | None:
        """What ``action`` gives, which all workers do together between two steps; None if one was lost meanwhile: then it
        is left undone."""
        try:
            return action()
        except (CollectiveError, CheckpointError) as error:
            cause = error if isinstance(error, RuntimeError) else RuntimeError(str(error))
            if not self.members.survive(cause):
                raise
            return None

    def evaluate_when_due(self, every: int) -> dict[str, float] | None:
        """See :meth:`Trainer.evaluate_when_due`."""
        return self.together(lambda: super(ElasticTrainer, self).evaluate_when_due(every))

    def evaluate_at_the_end(self) -> dict[str, float]:
        while True:
            self.members.catch_up()
            validation = self.together(self.evaluate)
            if validation is not None:
                return validation

    def save_when_due(self) -> None:
        """See :meth:`Trainer.save_when_due`."""
        self.together(super().save_when_due)

    def save_remaining(self) -> None:
        """The last checkpoint of those who are left, too few to go on."""
        if (
            self.local_updates is not None
        ):  # its own steps count, whether or not the round after them took place
            self.progress.step = self.local_updates.step
        comm: DistComm = self.members.remaining()
        contents = self.checkpoint_contents() | {"comm": comm}
        commkit.checkpoint.save(self.run.checkpoint(self.progress.step), **contents)
        comm.barrier()

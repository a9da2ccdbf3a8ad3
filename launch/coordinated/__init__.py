"""Training with a coordinator: some ranks hold the weights, the others compute gradients in rounds.

Scheme and records are those of any other run; ``docs`` of each are in :mod:`commkit.straggler`. A step's batch is
``batch.per_rank * batch.accumulate`` samples per worker, the very samples that plain training with as many ranks
reads in that step. Losses are of the whole batch, as far as it is in the gradient. Rank 0 has to be the first
coordinator: it validates, and writes records and checkpoints; workers add what they have left unsent.
"""

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from commkit.straggler import StragglerScheme
from launch.coordinated.checks import check, number_of_ranks
from launch.coordinated.coordinator import CoordinatorRun
from launch.coordinated.worker import WorkerRun
from launch.roles import scheme_of
from launch.settings import TrainSettings

if TYPE_CHECKING:
    from launch.train import Job

__all__ = ["concerns", "set_up"]


def concerns(settings: TrainSettings) -> bool:
    """Whether the scheme has a coordinator."""
    return scheme_of(settings, StragglerScheme) is not None


def set_up(job: "Job") -> CoordinatorRun | WorkerRun:
    """Join the other ranks, and build this one's part.

    Raises:
        ValueError, TypeError, RuntimeError, ModuleNotFoundError: what the user asked for cannot be had.
    """
    scheme = scheme_of(job.settings, StragglerScheme)
    assert scheme is not None
    rounds, batch = check(job.settings, scheme, number_of_ranks(job.world, scheme))
    if scheme.transport == "torch":
        job.world.join(job.device)
    network = scheme.network()
    count = rounds.delay + 1 if scheme.options.interleave == "models" else 1
    models = [_build(job, number).to(job.device) for number in range(count)]
    made: CoordinatorRun | WorkerRun
    if network.rank in scheme.options.coordinators:
        made = CoordinatorRun(job, scheme, network, models, batch)
    else:
        made = WorkerRun(job, scheme, network, models[0], batch)
    made.start()
    return made


def _build(job: "Job", number: int) -> nn.Module:
    """The task's model; the first one as ever, further ones from other seeds."""
    if not number:
        return job.task.build()
    task: Any = copy.copy(job.task)
    task.settings = job.settings.model_copy(update={"seed": job.settings.seed + number})
    model: nn.Module = task.build()
    return model

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

from typing import TYPE_CHECKING

import torch

from commkit.outer import AsyncScheme
from launch import roles
from launch.asynchronous.server import Server
from launch.asynchronous.shards import Shards
from launch.asynchronous.worker import Worker
from launch.optimizer import make_optimizer
from launch.settings import TrainSettings

if TYPE_CHECKING:
    from launch.train import Job

__all__ = ["Server", "Shards", "Worker", "scheme_of", "set_up"]


def scheme_of(settings: TrainSettings) -> AsyncScheme | None:
    """The recipe's scheme if it is this one.

    Raises:
        ConfigError: unknown scheme or field, or a value out of range.
    """
    return roles.scheme_of(settings, AsyncScheme)


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

"""A worker's vectors: gradients of shares of the data, in the combination that its plan says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .partitions import BatchLayout, partition_seed
from .protocol import Party
from .ring import Ring
from .schedule import Chunk, MiniTask


@dataclass(frozen=True)
class Share:
    """A piece of data to compute a gradient on.

    Args:
        job: which step's data, over all models.
        model: that it is for; 0 unless several are trained in turn.
        step: of this model.
        samples: numbers of the run's samples, the same on every worker that computes this piece.
        seed: for dropout and augmentation of this piece, the same on every worker that computes it.
        superseded: whether the round is over meanwhile, so that the rest is in vain; ask it where a piece takes long.
    """

    job: int
    model: int
    step: int
    samples: range
    seed: int
    superseded: Callable[[], bool]


LossOf: TypeAlias = Callable[[Share], "Tensor | None"]


class Computation:
    """
    Args:
        party: whose module computes.
        ring: the weights of every job under way, which are put into the module as they are needed.
        layout: of a job's batch.
        num_models: that are trained in turn.
    """

    def __init__(self, party: Party, ring: Ring, layout: BatchLayout, num_models: int) -> None:
        self._party, self._ring, self._layout = party, ring, layout
        self._num_models = num_models
        self._loaded: int | None = None  # the job whose weights are in the module

    def weights_changed(self) -> None:
        """The ring has been told other weights; those in the module may not be a job's any more."""
        self._loaded = None

    def vector(
        self, task: MiniTask, loss_of: LossOf, superseded: Callable[[], bool]
    ) -> tuple[dict[str, Tensor] | None, float]:
        """A mini-task's vector in at least float32, on the model's device, and its loss, coded likewise; None if it was
        given up.

        Args:
            loss_of: see :meth:`Worker.run`.
            superseded: see :class:`Share`.
        """
        self._load(task.job)
        total: dict[str, Tensor] = {}
        coded_loss = 0.0
        for chunk in task.chunks:
            if superseded():
                return None, 0.0
            share = self._share(task.job, chunk, superseded)
            for p in self._party.parameters.values():
                p.grad = None
            loss = loss_of(share)
            if loss is None:
                return None, 0.0
            loss.backward()  # type: ignore[no-untyped-call]
            weight = chunk.coefficient * len(share.samples) / self._layout.batch
            self._add(total, weight)
            coded_loss += weight * float(loss.detach())
        return total, coded_loss

    def _share(self, job: int, chunk: Chunk, superseded: Callable[[], bool]) -> Share:
        step, model = divmod(job, self._num_models)
        samples = self._layout.samples(step, chunk)
        seed = partition_seed(self._party.options.seed, step, chunk.start)
        return Share(job, model, step, samples, seed, superseded)

    @torch.no_grad()
    def _add(self, total: dict[str, Tensor], weight: float) -> None:
        for name, p in self._party.parameters.items():
            dtype = torch.promote_types(p.dtype, torch.float32)
            if name not in total:
                total[name] = torch.zeros_like(p, dtype=dtype)
            if p.grad is not None:
                total[name].add_(p.grad.to(dtype), alpha=weight)
                p.grad = None

    @torch.no_grad()
    def _load(self, job: int) -> None:
        """The weights that ``job`` is computed with, into the module."""
        if self._loaded == job:
            return
        for name, x in self._ring.of_job(job).items():
            self._party.parameters[name].copy_(x)
        self._loaded = job

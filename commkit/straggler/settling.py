"""The end of a job, on the first coordinator: its gradient is put together, a step is made, a record written."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import torch

from .arrivals import Arrivals
from .backup import StepResult
from .others import OtherCoordinators
from .protocol import Kind, message
from .record import StepRecord
from .rounds import Due

if TYPE_CHECKING:
    from torch import Tensor

    from .coordinator import Coordinator, OnStep

_HOPELESS = 10  # jobs in a row that could not be had


class ClosedRound(NamedTuple):
    """The round that a job ended with. Workers are given by number.

    Args:
        number: of it.
        awaited: k, with backup workers; else None.
        arrived: seconds from its start, by worker, in the order of arrival.
        late: who was.
        seconds: that it took.
        before: when the round before it had ended, on the coordinator's clock.
        arrivals: what came.
    """

    number: int
    awaited: int | None
    arrived: dict[int, float]
    late: set[int]
    seconds: float
    before: float
    arrivals: Arrivals


class Settler:
    """
    Args:
        coordinator: whose weights it changes.
        others: are told of it.
        on_step: see :meth:`Coordinator.run`, as the other.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        others: OtherCoordinators,
        on_step: OnStep | None,
        whole_at: Callable[[int], bool] | None,
    ) -> None:
        self._coordinator, self._others = coordinator, others
        self._rounds, self._stats = coordinator.rounds, coordinator.stats
        self._ranks = coordinator.party.workers  # by worker
        self._on_step = on_step
        self._whole_at = whole_at or (lambda job: False)
        self._poisoned = 0  # jobs in a row that could not be had

    def settle(self, due: Due, closed: ClosedRound) -> bool:
        """Whether the weights have changed; if not, the gradient could not be had, or was not finite.

        Raises:
            FloatingPointError: nothing finite comes any more.
        """
        coordinator = self._coordinator
        loss = math.nan
        if due.weights is not None:
            loss = coordinator.results.loss(due.job, due.weights)
        gradient, own = coordinator.combine(due)
        norms = [math.fsum(row) for row in self._others.norms(own).tolist()]
        norm, whole = math.sqrt(norms[0]), self._whole_at(due.job)
        skipped = gradient is None or not math.isfinite(norm)
        scale = 0.0 if skipped else coordinator.scale(norm)
        verdict = torch.tensor([scale, norm, skipped, whole], dtype=torch.float64)
        self._others.tell(message(Kind.STEP, closed.number, 0, [verdict]))
        if gradient is None or skipped:
            self._skip()
        else:
            self._step(due, gradient, scale)
            self._observe(due, closed, norms)
        if whole:
            self._others.take_parts()
        if self._on_step is not None:
            self._on_step(self._record(due, closed, loss, norm, skipped))
        return not skipped

    def _step(self, due: Due, gradient: dict[str, Tensor], scale: float) -> None:
        self._coordinator.apply(due.job, gradient, scale)
        self._poisoned = 0
        self._stats.steps += 1

    def _skip(self) -> None:
        self._stats.skipped += 1
        self._poisoned += 1
        if self._poisoned >= _HOPELESS:
            raise FloatingPointError(
                f"the gradients of the last {self._poisoned} jobs held inf or NaN, or lacked those that did; lower "
                "the learning rate, or resume from a checkpoint"
            )

    def _observe(self, due: Due, closed: ClosedRound, norms: list[float]) -> None:
        """Tell the scheme how it went, if it wants to know."""
        if not self._rounds.wants_norms or closed.awaited is None or due.weights is None:
            return
        places = {worker: place for place, worker in enumerate(sorted(closed.arrived), 1)}
        order = list(closed.arrived)
        model = self._coordinator.model_of(due.job)
        self._rounds.observe(
            StepResult(
                due.job,
                closed.awaited,
                tuple(order),
                tuple(closed.arrived.values()),
                tuple(norms[places[worker]] for worker in order),
                norms[0],
                tuple(sum(closed.arrivals.report(worker).losses) for worker in order),
                float(self._coordinator.optimizers[model].param_groups[0]["lr"]),
            )
        )

    def _record(
        self, due: Due, closed: ClosedRound, loss: float, norm: float, skipped: bool
    ) -> StepRecord:
        coordinator = self._coordinator
        computing = [closed.arrivals.report(worker).seconds for worker in closed.arrived]
        contributors = sorted({worker for worker, _ in due.weights or {}})
        return StepRecord(
            due.job,
            coordinator.model_of(due.job),
            due.job // len(coordinator.models),
            loss,
            tuple(self._ranks[worker] for worker in contributors),
            tuple(self._ranks[worker] for worker in sorted(closed.late)),
            closed.awaited,
            closed.seconds,
            coordinator.clock() - closed.before,
            median(computing) if computing else math.nan,
            norm,
            skipped,
        )

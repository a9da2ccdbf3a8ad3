"""A batch that grows with what tests ask for."""

from __future__ import annotations

from .norm_test import BatchPlan, plan_batch


class GrowingBatch:
    """The batch that was asked for, and how steps are made of it.

    Args:
        initial: samples per worker and step at the start.
        max_micro_batch: as for :func:`~commkit.outer.norm_test.plan_batch`.
        switch_at: the same.
        max_batch: the most samples per worker and step; None is no limit.

    Attributes:
        requested: samples per worker and step.
        plan: how a step is made of them.
    """

    def __init__(
        self, initial: int, max_micro_batch: int, switch_at: float, max_batch: int | None
    ) -> None:
        self._max_micro_batch, self._switch_at = max_micro_batch, switch_at
        self._max_batch = max_batch
        self.requested = initial
        self.plan = self._first = self._plan_for(initial)

    @property
    def growth(self) -> float:
        """Samples of a step over those at the start."""
        return self.plan.samples / self._first.samples

    def grow(self, request: int) -> bool:
        """Ask for ``request`` samples if that is more than before. Returns whether the plan has changed."""
        if self._max_batch is not None:
            request = min(request, self._max_batch)
        return self.ask_for(max(self.requested, request))

    def ask_for(self, requested: int) -> bool:
        """Ask for ``requested`` samples, be it fewer than before. Returns whether the plan has changed."""
        self.requested = requested
        before, self.plan = self.plan, self._plan_for(requested)
        return self.plan != before

    def _plan_for(self, requested: int) -> BatchPlan:
        return plan_batch(requested, self._max_micro_batch, self._switch_at, self._max_batch)

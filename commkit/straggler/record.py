"""What coordinated training reports."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One job that is finished. Workers are given by their rank.

    Args:
        job: counting from 0.
        model: that it was of; 0 unless several are trained in turn.
        step: of this model, counting from 0.
        loss: mean over the samples that the gradient is made of, at the weights it was computed with; nan on
            coordinators other than the first.
        contributors: workers whose vectors are in the gradient.
        late: workers that were late in the round that finished it.
        awaited: k, with backup workers; else None.
        seconds: of the round that finished it, from sending the weights to closing it.
        step_seconds: from the end of the round before to the weights being changed.
        compute_seconds: that the workers which were in time took on their own clocks, the median.
        norm: of the gradient, before clipping.
        skipped: it could not be had, or was not finite, and the weights are as before.
    """

    job: int
    model: int
    step: int
    loss: float
    contributors: tuple[int, ...]
    late: tuple[int, ...]
    awaited: int | None
    seconds: float
    step_seconds: float
    compute_seconds: float
    norm: float
    skipped: bool


@dataclass(slots=True)
class CoordinationStats:
    """Totals of the first coordinator, since the start.

    Args:
        rounds: closed.
        steps: jobs applied.
        skipped: jobs that were not.
        used: by worker rank, rounds that it was in time for.
        late: by worker rank, rounds that closed without it.
        stale: messages of rounds that were over, which were dropped.
        nonfinite: results that held inf or NaN.
        returned: times that a worker came back after it had been sent no more.
        lost_workers: ranks, in the order in which they were lost or left.
    """

    rounds: int = 0
    steps: int = 0
    skipped: int = 0
    used: dict[int, int] = field(default_factory=dict)
    late: dict[int, int] = field(default_factory=dict)
    stale: int = 0
    nonfinite: int = 0
    returned: int = 0
    lost_workers: list[int] = field(default_factory=list)

    def drop_rate(self, worker: int) -> float:
        """Share of the rounds that closed without ``worker``."""
        return self.late.get(worker, 0) / self.rounds if self.rounds else 0.0

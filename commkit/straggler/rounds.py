"""What a coordinator asks of a scheme: who computes what, whether enough has arrived, what comes of it.

Two kinds of schemes answer: schedules of coded gradients, and backup workers. Rounds and jobs are counted from the
start of training, also where a schedule begins anew.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .backup import BackupPolicy, StepResult
from .mu_rule import MuRule
from .schedule import Chunk, MiniTask, Schedule


@dataclass(frozen=True)
class Due:
    """A job whose time is up.

    Args:
        job: which.
        weights: (worker, index) -> weight of each result in its gradient, in the order in which to add them up; None:
            it cannot be had.
    """

    job: int
    weights: Mapping[tuple[int, int], float] | None


class Rounds(ABC):
    """
    Attributes:
        number: of the round that is under way or comes next.
        num_jobs: jobs to do in all.
    """

    num_workers: int
    num_units: int
    delay: int
    wants_norms = False
    keeps_dropped = False
    """Whether a gradient that came too late is missing from the data, so that its worker may keep it."""

    def __init__(self) -> None:
        self.number = 0
        self.num_jobs = 0

    @property
    @abstractmethod
    def job(self) -> int | None:
        """The job that begins in this round; None: those under way are only finished."""

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether all jobs are done."""

    @abstractmethod
    def limit(self, num_jobs: int) -> None:
        """Do ``num_jobs`` in all."""

    @abstractmethod
    def plan(self) -> tuple[tuple[MiniTask, ...], ...]:
        """What each worker computes in this round."""

    @abstractmethod
    def enough(self, late: Collection[int], out: Collection[int], dead: Collection[int]) -> bool:
        """Whether the round may close without ``late``, of whom ``out`` will not deliver in it, and ``dead``, part of
        these, never again."""

    def not_before(self, fastest: float) -> float:
        """Seconds since the round began before which it stays open for everybody, if the fastest worker took
        ``fastest``."""
        return 0.0

    @abstractmethod
    def lost(self, late: Collection[int], dead: Collection[int]) -> tuple[int, ...]:
        """Jobs that cannot be had if this round closes without ``late`` and ``dead`` never come back."""

    @abstractmethod
    def close(self, late: Collection[int]) -> Due | None:
        """The round is over; the job that is due now."""

    @property
    @abstractmethod
    def open_jobs(self) -> tuple[int, ...]: ...

    @abstractmethod
    def restart(self, job: int) -> None:
        """Go on with ``job``, and nothing under way."""

    @property
    def awaited(self) -> int | None:
        """How many are awaited in this round; None if that depends on whom."""
        return None

    def observe(self, result: StepResult) -> None:  # noqa: B027
        """A job was finished."""

    def observe_late(self, number: int, seconds: float) -> None:  # noqa: B027
        """A worker has finished its part of round ``number`` after it was closed."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: the state is of another scheme, or of another number of workers.
        """


class ScheduledRounds(Rounds):
    """
    Args:
        make: builds the schedule, which is made anew when one has come to its end and there is more to do.
        rule: how long a round stays open.
    """

    def __init__(self, make: Callable[[], Schedule], rule: MuRule) -> None:
        super().__init__()
        self._make, self._rule = make, rule
        self._schedule = make()
        self.num_workers, self.num_units = self._schedule.num_workers, self._schedule.num_units
        self.delay = self._schedule.delay
        self._job0 = 0  # the schedule's job 0

    @property
    def job(self) -> int | None:
        begins = self._schedule.round
        return self._job0 + begins if self._schedule.has_job(begins) else None

    @property
    def ended(self) -> bool:
        return self._job0 + (self._schedule.num_jobs or 0) >= self.num_jobs and self._is_over

    @property
    def _is_over(self) -> bool:
        rounds = self._schedule.num_rounds
        return rounds is not None and self._schedule.round >= rounds

    def limit(self, num_jobs: int) -> None:
        self.num_jobs = num_jobs
        schedule = self._schedule
        # Once rounds have passed in which no job began, the schedule has to come to its end.
        draining = schedule.num_jobs is not None and schedule.round > schedule.num_jobs
        if not draining:
            schedule.num_jobs = max(num_jobs - self._job0, schedule.round)
        self._renew()

    def _renew(self) -> None:
        if self._is_over and not self.ended:
            self.restart(self._job0 + (self._schedule.num_jobs or 0))

    def restart(self, job: int) -> None:
        self._schedule, self._job0 = self._make(), job
        self._schedule.num_jobs = max(self.num_jobs - job, 0)

    def plan(self) -> tuple[tuple[MiniTask, ...], ...]:
        return tuple(
            tuple(replace(task, job=self._job0 + task.job) for task in tasks)
            for tasks in self._schedule.plan()
        )

    def enough(self, late: Collection[int], out: Collection[int], dead: Collection[int]) -> bool:
        if self._schedule.fits(late):
            return True
        return set(late) <= set(out) and not self._schedule.lost_jobs(late, dead)

    def not_before(self, fastest: float) -> float:
        return self._rule.deadline(fastest)

    def lost(self, late: Collection[int], dead: Collection[int]) -> tuple[int, ...]:
        return tuple(self._job0 + job for job in self._schedule.lost_jobs(late, dead))

    def close(self, late: Collection[int]) -> Due | None:
        schedule = self._schedule
        schedule.record(late)
        self.number += 1
        job, due = schedule.due, None
        if job is not None:
            weights = schedule.decode(job) if schedule.decodable(job) else None
            due = Due(self._job0 + job, weights)
        self._renew()
        return due

    @property
    def open_jobs(self) -> tuple[int, ...]:
        return tuple(self._job0 + job for job in self._schedule.open_jobs)

    def state_dict(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "job0": self._job0,
            "jobs": self._schedule.num_jobs,
            "schedule": self._schedule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        schedule = self._make()
        schedule.load_state_dict(state["schedule"])
        schedule.num_jobs = state["jobs"]
        self._schedule, self.number, self._job0 = schedule, state["number"], state["job0"]


class FirstK(Rounds):
    """The mean of the first k gradients. Each worker has its share of the batch, another one in every round, so that no
    part of it is always a slow worker's.

    Args:
        policy: chooses k.
        adapts: with fewer workers than k left, go on with those.
    """

    delay = 0
    keeps_dropped = True

    def __init__(self, policy: BackupPolicy, adapts: bool) -> None:
        super().__init__()
        self.policy, self._adapts = policy, adapts
        self._k: int | None = (
            None  # of the round under way, which nobody that comes late may change
        )
        self.num_workers = self.num_units = policy.num_workers
        self.wants_norms = adapts

    @property
    def job(self) -> int | None:
        return self.number if self.number < self.num_jobs else None

    @property
    def ended(self) -> bool:
        return self.number >= self.num_jobs

    def limit(self, num_jobs: int) -> None:
        self.num_jobs = num_jobs

    def restart(self, job: int) -> None:
        self.number, self._k = job, None

    def plan(self) -> tuple[tuple[MiniTask, ...], ...]:
        n = self.num_workers
        return tuple((MiniTask(self.number, i, 0, True, (self._share(i),)),) for i in range(n))

    def _share(self, worker: int) -> Chunk:
        unit = (worker + self.number) % self.num_workers
        return Chunk(unit, unit + 1, float(self.num_workers))

    @property
    def awaited(self) -> int:
        if self._k is None:
            self._k = self.policy.choose()
        return self._k

    def enough(self, late: Collection[int], out: Collection[int], dead: Collection[int]) -> bool:
        k = self.awaited
        if self._adapts:
            k = max(1, min(k, self.num_workers - len(set(out))))
        return self.num_workers - len(set(late)) >= k

    def lost(self, late: Collection[int], dead: Collection[int]) -> tuple[int, ...]:
        least = 1 if self._adapts else self.awaited
        return (self.number,) if self.num_workers - len(set(dead)) < least else ()

    def close(self, late: Collection[int]) -> Due | None:
        here = [i for i in range(self.num_workers) if i not in set(late)]
        job, enough = self.number, self.enough(late, late, ())
        self.number, self._k = self.number + 1, None
        return Due(job, {(i, 0): 1 / len(here) for i in here} if enough else None)

    @property
    def open_jobs(self) -> tuple[int, ...]:
        return ()

    def observe(self, result: StepResult) -> None:
        self.policy.observe(result)
        self._k = None

    def observe_late(self, number: int, seconds: float) -> None:
        self.policy.observe_late(number, seconds)

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number, "policy": self.policy.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "policy" not in state:
            raise ValueError("the state is of a coded scheme; resume with the scheme that saved it")
        self.policy.load_state_dict(state["policy"])
        self.number, self._k = state["number"], None

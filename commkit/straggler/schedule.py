"""What a coordinator drives: who computes what in each round, and how a job's gradient comes out.

A *job* is one optimizer step's gradient over one batch. Job t begins in round t and is due at the end of round
``t + delay``. In each round every worker works off its mini-tasks and sends all results at the end of it; a worker
that is late delivers nothing of that round. The coordinator's loop, for any schedule::

    while schedule.num_rounds is None or schedule.round < schedule.num_rounds:
        plan = schedule.plan()                  # per worker, its mini-tasks; send them with the weights they need
        ...                                     # wait; who is late follows from the mu-rule and schedule.fits
        schedule.record(late)                   # results of late workers are dropped, also when they come
        job = schedule.due                      # the job whose time is up, or None
        if job is not None:
            weights = schedule.decode(job)      # (worker, index) -> weight; its weighted results add up to the
            ...                                 # gradient sum over the job's whole batch
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .masks import mask_of


@dataclass(frozen=True, slots=True)
class Chunk:
    """A range of a job's data.

    Args:
        start, stop: in units, of which a job's data has :attr:`Schedule.num_units`, all equal. With a batch of
            b samples, unit u is samples ``u * b / num_units`` to ``(u + 1) * b / num_units``.
        coefficient: the factor of its gradient sum in the result.
    """

    start: int
    stop: int
    coefficient: float = 1.0

    @property
    def units(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class MiniTask:
    """One vector to compute: the sum over ``chunks`` of coefficient times gradient *sum* over its samples, at
    the weights with which ``job`` is computed.

    Args:
        job: which one.
        worker: who.
        index: which of this worker's vectors for this job; a repeated attempt has the index of the first.
            (job, worker, index) names a result.
        coded: False: it enters the sum with weight 1, whatever else arrives, so it may be added up at
            once. True: its weight is known when the job is decoded.
        chunks: what it is made of.
    """

    job: int
    worker: int
    index: int
    coded: bool
    chunks: tuple[Chunk, ...]

    @property
    def units(self) -> int:
        """How much data it reads, in units of the schedule."""
        return sum(chunk.units for chunk in self.chunks)


class NotDecodable(RuntimeError):
    """Too many results of a job are missing.

    Attributes:
        job: which one.
        workers: those without whom it cannot be had.
    """

    def __init__(self, job: int, workers: Collection[int], delay: int) -> None:
        self.job, self.workers = job, tuple(sorted(workers))
        super().__init__(
            f"the gradient of job {job} cannot be decoded at the end of round {job + delay}: results of "
            f"workers {list(self.workers)} are missing; wait for them, restart without them, or choose a "
            "code that tolerates more stragglers"
        )


class Schedule(ABC):
    """Who computes what, round by round; see the module. Pure and deterministic: the same ``record`` calls
    give the same plans. A job's state is kept until the round after it was due.

    Args:
        num_workers: n, >= 1.
        num_jobs: J; rounds from J on only finish what was begun. None: endless.

    Attributes:
        round: the one to plan, or planned but not recorded; from 0.
    """

    num_units: int
    """Into how many equal units a job's data is cut; a batch must be a multiple of it."""
    delay: int
    """T: how many rounds after its own a job is due. T + 1 jobs are under way at a time, so either T + 1 models
    are trained in turn, or one model takes gradients that are T rounds old."""
    load: float
    """The largest share of a job's data that one worker computes in a round: 1/n without redundancy."""
    name: ClassVar[str]

    def __init__(self, num_workers: int, num_jobs: int | None) -> None:
        if num_jobs is not None and num_jobs < 0:
            raise ValueError(f"num_jobs={num_jobs} must be >= 0, or None for endless training")
        self.num_workers = num_workers
        self.num_jobs = num_jobs
        self.round = 0
        self._all = (1 << num_workers) - 1
        self._plan: tuple[tuple[MiniTask, ...], ...] | None = None

    @property
    def num_rounds(self) -> int | None:
        """Rounds until every job is finished; None if there is no end."""
        return None if self.num_jobs is None else self.num_jobs + self.delay

    @property
    def due(self) -> int | None:
        """The job that was due at the end of the last recorded round, if there is one."""
        job = self.round - 1 - self.delay
        return job if self.has_job(job) else None

    @property
    def open_jobs(self) -> tuple[int, ...]:
        """Jobs begun in recorded rounds and not yet due: whose results a coordinator holds."""
        return tuple(job for job in range(self.round - self.delay, self.round) if self.has_job(job))

    def has_job(self, job: int) -> bool:
        return job >= 0 and (self.num_jobs is None or job < self.num_jobs)

    def stop(self) -> None:
        """Begin no more jobs: after ``delay`` further rounds none is open. That is when to write a checkpoint
        that needs no partial sums, and when to go on with another number of workers, by a new schedule."""
        self.num_jobs = self.round if self.num_jobs is None else min(self.num_jobs, self.round)
        self._plan = None

    def plan(self) -> tuple[tuple[MiniTask, ...], ...]:
        """What each worker computes in this round; ``plan()[i]`` is worker i's, maybe empty."""
        if self._plan is None:
            self._plan = tuple(self._tasks(worker) for worker in range(self.num_workers))
        return self._plan

    def fits(self, late: Collection[int]) -> bool:
        """Whether the round may be closed without ``late``: what was recorded so far and this round are a
        pattern for which decoding in time is guaranteed."""
        mask = mask_of(late, self.num_workers)
        return not mask or self._fits(mask)

    def record(self, late: Collection[int]) -> None:
        """Close the round: everybody but ``late`` has delivered its part of the plan."""
        self._record(mask_of(late, self.num_workers))
        self.round += 1
        self._plan = None

    @abstractmethod
    def decodable(self, job: int) -> bool:
        """Whether :meth:`decode` has what it needs."""

    @abstractmethod
    def decode(self, job: int) -> dict[tuple[int, int], float]:
        """(worker, index) -> weight of each result that enters the sum, in the order in which to add them up; those of
        weight 0 are left out.

        Raises:
            NotDecodable: too many are missing.
            ValueError: the job is not under way.
        """

    @abstractmethod
    def missing(self, job: int) -> tuple[int, ...]:
        """Workers that owe a result of ``job``, whether or not it can do without; of a job under way."""

    def lost_jobs(self, late: Collection[int], dead: Collection[int]) -> tuple[int, ...]:
        """Jobs under way, this round's included, that could not be decoded in time if this round closed
        without ``late``, ``dead`` never came back and everybody else were always in time."""
        ahead = self._fork()
        wanted = [*self.open_jobs, *([self.round] if self.has_job(self.round) else [])]
        lost, everybody = [], {*late, *dead}
        for step in range(self.delay + 1):
            ahead.record(everybody if step == 0 else dead)
            if ahead.due in wanted and not ahead.decodable(ahead.due):
                lost.append(ahead.due)
        return tuple(lost)

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What was recorded, as numbers and lists of numbers. Results are the coordinator's to save."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, of an equal schedule.

        Raises:
            ValueError: the state is of another schedule.
        """

    @abstractmethod
    def _fork(self) -> Schedule:
        """A copy with a future of its own."""

    @abstractmethod
    def _tasks(self, worker: int) -> tuple[MiniTask, ...]: ...

    @abstractmethod
    def _fits(self, late: int) -> bool: ...

    @abstractmethod
    def _record(self, late: int) -> None: ...

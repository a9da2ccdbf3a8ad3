"""Multiplexed sequential gradient coding: in each round a worker works on many jobs, a little on each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .codes import GradientCode
from .masks import members
from .models import Arbitrary, Bursty
from .requirements import check_pattern, need_code, require_code, require_same
from .schedule import Chunk, MiniTask, NotDecodable, Schedule


@dataclass
class _Job:
    """What arrived of a job, and which models its rounds fit so far."""

    raw: npt.NDArray[
        np.int64
    ]  # (n,): how many D1 results each worker delivered, which it does in order
    coded: npt.NDArray[np.bool_]  # (B, n): coded results of each D2 group
    fits: list[bool]


class MSGC(Schedule):
    """Most of a job is computed once and merely tried again if lost; the rest is coded (Krishnan et al. 2023,
    section 3.3).

    A job's data is D1, of which worker i owns W - 1 chunks that nobody else has, and D2, of B groups under an
    (n, lambda) code. In round r a worker does K = W - 1 + B mini-tasks, one of each job r, r-1, ..., r-K+1: first
    its D1 chunks, then those it lost, then, if it lost none, its coded vectors. All mini-tasks are equally
    large. Exact for (B, W, lambda)-bursty and for (B, W+B-1, lambda)-arbitrary patterns, at load
    ``(lambda+1)(W-1+B) / (n (B + (W-1)(lambda+1)))``, or ``(W-1+B) / (n (W-1))`` with lambda = n. Delay
    ``T = W-2+B``.

    Results are indexed 0 to W-2 (D1, uncoded) and W-1 to W-2+B (a coded vector per group).

    Args:
        num_workers: n.
        burst: B, rounds that a straggler stays slow. 1 if times are independent from round to round.
        rounds: W > B, or 1, which is gradient coding. Larger: less load and more jobs under way.
        stragglers: lambda, different stragglers in a window; n needs no code.
        code: for n and at least lambda, whose own s is lambda from here on; None: with lambda = n, or to count
            without planning.
        num_jobs: see :class:`Schedule`.

    Raises:
        ValueError: a number is out of range, or the code is for others.
    """

    name = "m_sgc"

    def __init__(
        self,
        num_workers: int,
        burst: int,
        rounds: int,
        stragglers: int,
        code: GradientCode | None,
        num_jobs: int | None = None,
    ) -> None:
        check_pattern(num_workers, burst, rounds, stragglers)
        if burst == rounds > 1:
            raise ValueError(
                f"rounds={rounds} must be > burst={burst} for m_sgc: what is not coded has to be sent between "
                f"bursts; use rounds={burst + 1}"
            )
        if stragglers == num_workers:
            if rounds == 1:
                raise ValueError(
                    f"stragglers={stragglers} must be < num_workers with rounds=1, where all is coded; use "
                    "rounds=2"
                )
            if code is not None:
                raise ValueError(
                    f"stragglers={stragglers} is all workers, which needs no code; give None"
                )
        require_code(code, num_workers, stragglers)
        stragglers = stragglers if code is None else code.num_stragglers
        super().__init__(num_workers, num_jobs)
        self.burst, self.rounds, self.stragglers, self.code = burst, rounds, stragglers, code
        self.delay = rounds - 2 + burst
        self.models = (
            Bursty(burst, rounds, stragglers),
            Arbitrary(burst, rounds + burst - 1, stragglers),
        )
        self._groups = burst if stragglers < num_workers else 0
        self._raw = rounds - 1
        # Units: a D2 chunk, of which a D1 chunk is as many as a coded vector reads.
        self._raw_units = stragglers + 1 if self._groups else 1
        self._coded_from = num_workers * self._raw * self._raw_units
        self.num_units = self._coded_from + self._groups * num_workers
        self.load = (self._raw + burst) * self._raw_units / self.num_units
        self._jobs: dict[int, _Job] = {}
        self._pattern: list[int] = []
        self._chunks: dict[tuple[int, int], tuple[Chunk, ...]] = {}

    def decodable(self, job: int) -> bool:
        state = self._of(job)
        return bool((state.raw == self._raw).all()) and not self._short_groups(state)

    def decode(self, job: int) -> dict[tuple[int, int], float]:
        state = self._of(job)
        lacking = np.flatnonzero(state.raw < self._raw).tolist()
        if lacking:
            raise NotDecodable(job, lacking, self.delay)
        results = {(i, k): 1.0 for i in range(self.num_workers) for k in range(self._raw)}
        for group, arrived in enumerate(state.coded):
            terms = need_code(self.code).terms(np.flatnonzero(arrived).tolist())
            if terms is None:
                raise NotDecodable(job, np.flatnonzero(~arrived).tolist(), self.delay)
            results |= {(i, self._raw + group): weight for i, weight in terms}
        return results

    def missing(self, job: int) -> tuple[int, ...]:
        state = self._of(job)
        owing = (state.raw < self._raw) | ~state.coded.all(axis=0)
        return tuple(np.flatnonzero(owing).tolist())

    def _short_groups(self, state: _Job) -> bool:
        """Whether a D2 group does not decode yet."""
        counts = state.coded.sum(axis=1)
        short = np.flatnonzero(counts < self.num_workers - self.stragglers)
        code = self.code
        return any(
            code is None or not code.can_decode(np.flatnonzero(state.coded[g]).tolist())
            for g in short
        )

    def _of(self, job: int) -> _Job:
        if job not in self._jobs:
            raise ValueError(f"job={job} is not under way in round {self.round}")
        return self._jobs[job]

    def _new_job(self) -> _Job:
        n = self.num_workers
        raw, coded = np.zeros(n, dtype=np.int64), np.zeros((self._groups, n), dtype=np.bool_)
        return _Job(raw, coded, [True] * len(self.models))

    def _tasks(self, worker: int) -> tuple[MiniTask, ...]:
        tasks = []
        for slot in range(self._raw + self.burst):
            job = self.round - slot
            if not self.has_job(job):
                continue
            delivered = int(self._jobs[job].raw[worker]) if job in self._jobs else 0
            if delivered < self._raw:
                tasks.append(
                    MiniTask(job, worker, delivered, False, self._raw_chunk(worker, delivered))
                )
            elif self._groups:
                chunks = self._coded_chunks(worker, slot - self._raw)
                tasks.append(MiniTask(job, worker, slot, True, chunks))
        return tuple(tasks)

    def _raw_chunk(self, worker: int, index: int) -> tuple[Chunk, ...]:
        start = (worker * self._raw + index) * self._raw_units
        return (Chunk(start, start + self._raw_units),)

    def _coded_chunks(self, worker: int, group: int) -> tuple[Chunk, ...]:
        if (worker, group) not in self._chunks:
            first = self._coded_from + group * self.num_workers
            self._chunks[worker, group] = tuple(
                Chunk(first + start, first + stop, coefficient)
                for start, stop, coefficient in need_code(self.code).runs_of(worker)
            )
        return self._chunks[worker, group]

    def _fits(self, late: int) -> bool:
        jobs = range(self.round - self.delay, self.round + 1)
        return all(any(self._fits_of(job, late)) for job in jobs if self.has_job(job))

    def _fits_of(self, job: int, late: int) -> list[bool]:
        """For each model, whether it admits the rounds of ``job``, this one included. A job depends on no
        others: its slots are its own."""
        before = self._pattern[len(self._pattern) - (self.round - job) :]
        fits = self._jobs[job].fits if job in self._jobs else [True] * len(self.models)
        return [
            ok and model.admits_next(before, late)
            for ok, model in zip(fits, self.models, strict=True)
        ]

    def _record(self, late: int) -> None:
        here = np.ones(self.num_workers, dtype=np.bool_)
        here[members(late)] = False
        for job in [job for job in self._jobs if job < self.round - self.delay]:
            del self._jobs[job]
        for slot in range(self._raw + self.burst):
            job = self.round - slot
            if not self.has_job(job):
                continue
            fits = self._fits_of(job, late)
            state = self._jobs.setdefault(job, self._new_job())
            state.fits = fits
            complete = state.raw == self._raw
            state.raw += here & ~complete
            if self._groups and slot >= self._raw:
                state.coded[slot - self._raw] = here & complete
        self._pattern = [*self._pattern, late][-self.delay :] if self.delay else []

    def _fork(self) -> MSGC:
        copy = MSGC(
            self.num_workers, self.burst, self.rounds, self.stragglers, self.code, self.num_jobs
        )
        copy.load_state_dict(self.state_dict())
        return copy

    def state_dict(self) -> dict[str, Any]:
        return {
            "schedule": self._identity(),
            "round": self.round,
            "pattern": [members(mask) for mask in self._pattern],
            "jobs": [
                [job, state.raw.tolist(), state.coded.tolist(), list(state.fits)]
                for job, state in sorted(self._jobs.items())
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        require_same(state["schedule"], self._identity())
        self.round, self._plan = state["round"], None
        self._pattern = [sum(1 << i for i in who) for who in state["pattern"]]
        self._jobs = {}
        for job, raw, coded, fits in state["jobs"]:
            self._jobs[job] = self._new_job()
            self._jobs[job].raw[:] = raw
            self._jobs[job].coded[:] = np.array(coded, dtype=np.bool_).reshape(
                self._groups, self.num_workers
            )
            self._jobs[job].fits = list(fits)

    def _identity(self) -> list[Any]:
        return [self.name, self.num_workers, self.burst, self.rounds, self.stragglers]

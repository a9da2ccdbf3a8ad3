"""Driving schedules through patterns of stragglers, with gradients that can be checked."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterable, Sequence

import numpy as np

from commkit.straggler import (
    MSGC,
    SRSGC,
    GradientCode,
    GradientCoding,
    MiniTask,
    Schedule,
    make_code,
)


@functools.cache
def code(n: int, s: int) -> GradientCode:
    return make_code(n, s)


def gradient_coding(n: int, s: int, num_jobs: int | None = None) -> GradientCoding:
    return GradientCoding(n, s, code(n, s), num_jobs)


def sr_sgc(n: int, burst: int, rounds: int, lam: int, num_jobs: int | None = None) -> SRSGC:
    s = SRSGC.code_stragglers(n, burst, rounds, lam)
    return SRSGC(n, burst, rounds, lam, code(n, s), num_jobs)


def m_sgc(n: int, burst: int, rounds: int, lam: int, num_jobs: int | None = None) -> MSGC:
    return MSGC(n, burst, rounds, lam, None if lam == n else code(n, lam), num_jobs)


def result_of(task: MiniTask, units: np.ndarray) -> float:
    """What a worker sends, if unit u of the job's data has gradient ``units[u]``."""
    return sum(c.coefficient * units[c.start : c.stop].sum() for c in task.chunks)


class Trial:
    """A coordinator without messages: gradients are numbers, drawn per job and unit."""

    def __init__(self, schedule: Schedule, seed: int = 0) -> None:
        self.schedule = schedule
        self.seed = seed
        self.results: dict[tuple[int, int, int], float] = {}
        self.attempts: dict[tuple[int, int, int], int] = {}
        self.errors: dict[int, float] = {}
        self.units_read: list[list[int]] = []

    def units(self, job: int) -> np.ndarray:
        state = np.random.RandomState((self.seed * 1000 + job) % 2**32)
        return state.standard_normal(self.schedule.num_units)

    def round(self, late: Iterable[int]) -> None:
        """One round, and the decoding of what is due."""
        schedule, late = self.schedule, set(late)
        plan = schedule.plan()
        self.units_read.append([sum(task.units for task in tasks) for tasks in plan])
        for worker, tasks in enumerate(plan):
            for task in tasks:
                key = (task.job, task.worker, task.index)
                self.attempts[key] = self.attempts.get(key, 0) + 1
                assert task.worker == worker
                assert key not in self.results, "delivered already"
                if worker not in late:
                    self.results[key] = result_of(task, self.units(task.job))
        schedule.record(late)
        if schedule.due is not None:
            self.decode(schedule.due)

    def decode(self, job: int) -> None:
        assert self.schedule.decodable(job)
        weights = self.schedule.decode(job)
        total = sum(w * self.results[job, worker, index] for (worker, index), w in weights.items())
        exact = self.units(job).sum()
        scale = np.abs(self.units(job)).sum()
        self.errors[job] = abs(total - exact) / scale


def admissible(schedule: Schedule, rng: random.Random, eagerness: float) -> set[int]:
    """Random stragglers that ``schedule`` can do without in this round: as many as fit, in random order."""
    late: set[int] = set()
    for worker in rng.sample(range(schedule.num_workers), schedule.num_workers):
        if rng.random() < eagerness and schedule.fits(late | {worker}):
            late.add(worker)
    return late


def run(schedule: Schedule, patterns: Sequence[Iterable[int]], seed: int = 0) -> Trial:
    trial = Trial(schedule, seed)
    for late in patterns:
        trial.round(late)
    return trial


def signature(schedule: Schedule) -> str:
    """The schedule's state, relative to its round: equal ones have equal futures."""
    state = schedule.state_dict()
    now = state.pop("round")
    for name in ("delivered", "jobs"):
        if name in state:
            state[name] = [
                [job - now, *rest] for job, *rest in state[name] if job > now - 1 - schedule.delay
            ]
    return json.dumps(state)

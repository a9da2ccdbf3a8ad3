"""How long workers take, round by round: the delay models of straggler studies, on a clock that is not real.

Times are seconds for a worker's part of a round at a reference load, the share of a job's data that it computes;
:class:`~commkit.straggler.DelayProfile` carries them to other loads.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class DelayModel(ABC):
    """Random times of independent workers: a frozen dataclass that is its own configuration."""

    @abstractmethod
    def draw(self, state: np.random.RandomState, num_rounds: int, num_workers: int) -> Array:
        """``(rounds, n)`` seconds."""

    def seconds(self, num_rounds: int, num_workers: int, seed: int) -> Array:
        """``(rounds, n)`` seconds, all > 0; equal seeds give equal times."""
        return self.draw(np.random.RandomState(seed % 2**32), num_rounds, num_workers)


@dataclass(frozen=True)
class ShiftedExponential(DelayModel):
    """``constant`` plus an exponential time of mean ``mean``: independent from round to round."""

    constant: float
    mean: float

    def __post_init__(self) -> None:
        _positive(constant=self.constant, mean=self.mean)

    def draw(self, state: np.random.RandomState, num_rounds: int, num_workers: int) -> Array:
        return self.constant + state.exponential(self.mean, (num_rounds, num_workers))


@dataclass(frozen=True)
class Pareto(DelayModel):
    """At least ``least``, with P(time > t) = ``(least / t)^shape``: a heavy tail; no variance for shape <= 2."""

    least: float
    shape: float

    def __post_init__(self) -> None:
        _positive(least=self.least, shape=self.shape)

    def draw(self, state: np.random.RandomState, num_rounds: int, num_workers: int) -> Array:
        return self.least * (1 + state.pareto(self.shape, (num_rounds, num_workers)))


@dataclass(frozen=True)
class Bursts(DelayModel):
    """Two-state Markov chains (Gilbert and Elliott): what recorded traces of cloud workers look like. A worker
    becomes slow with probability ``enter`` per round and recovers with ``leave``, so that bursts last ``1/leave``
    rounds on average and a share ``enter / (enter + leave)`` is slow.

    Args:
        base: seconds of a worker that is not slow.
        jitter: spread of all times, as the sigma of a log-normal factor.
        enter, leave: probabilities per round, in (0, 1].
        slowdown: median factor of a slow worker's time, > 1.
        tail: sigma of the log-normal spread of that factor's excess over 1.
    """

    base: float
    enter: float
    leave: float
    slowdown: float
    jitter: float = 0.05
    tail: float = 0.5

    def __post_init__(self) -> None:
        _positive(base=self.base, enter=self.enter, leave=self.leave)
        if self.enter > 1 or self.leave > 1:
            raise ValueError(f"enter={self.enter} and leave={self.leave} are probabilities, <= 1")
        if not self.slowdown > 1 or not self.jitter >= 0 or not self.tail >= 0:
            raise ValueError(
                f"slowdown={self.slowdown} must be > 1, jitter={self.jitter} and tail={self.tail} >= 0"
            )

    def draw(self, state: np.random.RandomState, num_rounds: int, num_workers: int) -> Array:
        slow = np.empty((num_rounds, num_workers), dtype=np.bool_)
        now = state.uniform(size=num_workers) < self.enter / (self.enter + self.leave)
        for r in range(num_rounds):
            slow[r] = now
            u = state.uniform(size=num_workers)
            now = np.where(now, u >= self.leave, u < self.enter)
        excess = (self.slowdown - 1) * np.exp(self.tail * state.standard_normal(slow.shape))
        factor: Array = np.exp(self.jitter * state.standard_normal(slow.shape))
        return self.base * factor * np.where(slow, 1 + excess, 1.0)


@dataclass(frozen=True, eq=False)
class Trace(DelayModel):
    """Recorded times, played again from a round that the seed chooses, over and over.

    Args:
        recorded: ``(rounds, workers)`` seconds, > 0.
    """

    recorded: Array

    def __post_init__(self) -> None:
        if self.recorded.ndim != 2 or not self.recorded.size or not (self.recorded > 0).all():
            raise ValueError(
                f"recorded has shape {self.recorded.shape}; it must be (rounds, workers) with times > 0"
            )

    def draw(self, state: np.random.RandomState, num_rounds: int, num_workers: int) -> Array:
        rounds, workers = self.recorded.shape
        if num_workers > workers:
            raise ValueError(
                f"num_workers={num_workers} must be <= {workers}, the workers that were recorded"
            )
        first = int(state.randint(rounds))
        chosen: Array = self.recorded[(first + np.arange(num_rounds)) % rounds, :num_workers]
        return chosen


class BackupClock:
    """Steps in which the first k of n gradients are awaited, in virtual time.

    A late worker finishes what it is at before it begins the current step ("push and wait"), so the stragglers of
    one step start the next one late; or new weights make it start over at once ("push and interrupt").

    Args:
        seconds: ``(steps, n)``: how long each worker needs for the gradient that it *begins* in a step.
        interrupt: new weights abort work.
    """

    def __init__(self, seconds: Array, interrupt: bool = False) -> None:
        self.now = 0.0
        self.step = 0
        self._seconds, self._interrupt = seconds, interrupt
        self._free = np.zeros(seconds.shape[1])  # when each worker is done with what it is at
        self._begun: list[
            tuple[float, int, float]
        ] = []  # (done, step, its beginning), still to come

    def wait(self, k: int) -> tuple[list[int], list[float]]:
        """One step: the k workers that are first, and when, in seconds since the step began."""
        start = np.maximum(self._free, self.now)
        done = start + self._seconds[self.step % len(self._seconds)]
        order = np.argsort(done, kind="stable")
        first = order[:k].tolist()
        arrivals = (done[first] - self.now).tolist()
        end = float(done[first[-1]])
        if self._interrupt:
            self._free[:] = end
        else:
            begun = start < end  # whoever is busy until then skips this step
            self._free = np.where(begun, done, self._free)
            chosen = set(first)
            for worker in np.flatnonzero(begun).tolist():
                if worker not in chosen:
                    heapq.heappush(self._begun, (float(done[worker]), self.step, self.now))
        self.now = end
        self.step += 1
        return first, arrivals

    def late(self) -> Iterator[tuple[int, float]]:
        """(step, seconds since its weights were sent) of late gradients that have come by now."""
        while self._begun and self._begun[0][0] <= self.now:
            done, step, sent = heapq.heappop(self._begun)
            yield step, done - sent


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}={value} must be > 0")

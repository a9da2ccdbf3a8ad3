"""Schemes with a coordinator on a virtual clock: their own schedules say who computes what, and when enough has arrived."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..schemes import make_scheme
from ..sim import BackupClock
from ..straggler import (
    Backup,
    Candidate,
    Coding,
    DelayProfile,
    Method,
    Multiplexed,
    MuRule,
    SelectiveRepetition,
    StragglerScheme,
    is_usable,
    replay,
)
from ..straggler.selection import Scheme
from .cluster import Cluster
from .predict import ELEMENT, Prediction, Workload
from .transfers import shared_link, transferred

Array = npt.NDArray[np.float64]
MODEL_ERROR = 0.3  # of communication
_ROUNDS = 200
FEWEST = 3  # ranks: two workers and a coordinator
SCHEMES = ("backup", "gradient_coding", "sr_sgc", "m_sgc")


class CoordinationError(ValueError):
    """A scheme that cannot be played; the message says why."""


@dataclass(frozen=True)
class Played:
    """What became of some jobs.

    Args:
        seconds: of each round, computing and waiting.
        jobs: optimizer steps.
        used: workers whose shares of the batch each step has, in the mean.
        vectors: that a worker sends in a round, in the mean.
    """

    seconds: Array
    jobs: int
    used: float
    vectors: float

    @property
    def step_s(self) -> float:
        return float(self.seconds.sum()) / self.jobs


def method_of(name: str, num_workers: int, settings: Mapping[str, Any] | None = None) -> Method:
    """A registered scheme's method.

    Raises:
        CoordinationError: another kind of scheme, one whose rounds depend on gradients, or not for so many workers.
    """
    made = make_scheme(name, dict(settings or {}))
    if not isinstance(made, StragglerScheme):
        raise CoordinationError(
            f"scheme {name!r} has no coordinator; {', '.join(SCHEMES)} have one"
        )
    method = made.method
    try:
        if isinstance(method, Backup):
            method.build(num_workers)
        elif isinstance(method, Coding | SelectiveRepetition | Multiplexed):
            _candidate(method).build(num_workers, None, None)
        else:
            raise CoordinationError(
                f"scheme {name!r} chooses how many to await by the gradients, which a clock has none of; try backup with "
                "several num_backups"
            )
    except CoordinationError:
        raise
    except ValueError as error:
        raise CoordinationError(f"scheme {name!r} with {num_workers} workers: {error}") from None
    return method


def play(method: Method, times: Array, jobs: int, star: Star | None = None) -> Played:
    """
    Args:
        method: of :func:`method_of`, for as many workers.
        times: ``(rounds, workers)`` seconds for a worker's share of the batch, without redundancy; they begin anew after
            the last.
        jobs: optimizer steps to make.
        star: whose transfers take time too; None: nothing has to be sent.
    """
    if isinstance(method, Backup):
        return _first(method, times, jobs, star)
    assert isinstance(method, Coding | SelectiveRepetition | Multiplexed)
    return _coded(method, times, jobs, star)


def _first(method: Backup, times: Array, jobs: int, star: Star | None) -> Played:
    """A late worker finishes what it is at."""
    if star is not None:
        times = np.array([star.arrivals(done, late_go_on=True) for done in times])
    clock = BackupClock(times)
    k = method.build(times.shape[1]).awaited
    ends = [0.0]
    for _ in range(jobs):
        clock.wait(k)
        ends.append(clock.now)
    return Played(np.diff(ends), jobs, k, vectors_of(method))


def _coded(
    method: Coding | SelectiveRepetition | Multiplexed,
    times: Array,
    jobs: int,
    star: Star | None,
) -> Played:
    """Whoever is late begins the next round with the others. Where no code is known that float32 can carry, a job is taken to
    be decodable when as many vectors are there as any code needs."""
    workers, candidate = times.shape[1], _candidate(method)
    needed = candidate.code_stragglers(workers)
    code = "auto" if needed is not None and is_usable(workers, needed) else None
    schedule = candidate.build(workers, None, code)
    rounds = times * workers * schedule.load
    if star is not None:
        rounds = np.array([star.arrivals(done) for done in rounds])
    profile = DelayProfile(rounds, schedule.load, slope=0.0)
    replayed = replay(candidate, profile, MuRule(method.mu), jobs, code)
    return Played(np.array(replayed.durations), jobs, workers, vectors_of(method))


def _candidate(method: Coding | SelectiveRepetition | Multiplexed) -> Candidate:
    if isinstance(method, Coding):
        return Candidate("gradient_coding", method.num_stragglers)
    name: Scheme = "sr_sgc" if isinstance(method, SelectiveRepetition) else "m_sgc"
    return Candidate(name, method.stragglers, method.burst, method.rounds)


def vectors_of(method: Method) -> float:
    """That a worker sends in a round."""
    # One for each of the mini-tasks, see :class:`~commkit.straggler.MSGC`.
    return method.rounds - 1 + method.burst if isinstance(method, Multiplexed) else 1


@dataclass(frozen=True)
class Star:
    """A coordinator and its workers: everything passes the coordinator's link.

    Args:
        down_s, up_s: of a round's weights to all workers, and of their vectors, latency included.
        one_s: what a single worker's transfers take, both ways, latency included.
        link_bytes: that leave or reach the coordinator's node, the more of the two.
        latency_s: one way.
    """

    down_s: float
    up_s: float
    one_s: float
    link_bytes: float
    latency_s: float

    def arrivals(self, done: Array, late_go_on: bool = False) -> Array:
        """
        Args:
            done: ``(workers,)`` seconds that each computes, from when it has the weights.
            late_go_on: transfers that are late take part of the link from the next round, which counts here as if all that
                are under way had equal parts of it. Else see :func:`~commkit.cost.transfers.transferred`.

        Returns:
            when the coordinator has what each sends, from the beginning of the round.
        """
        move = shared_link if late_go_on else transferred
        down_s, up_s = ((s - self.latency_s) / len(done) for s in (self.down_s, self.up_s))
        begun = move(np.zeros_like(done), down_s) + self.latency_s
        return move(begun + done, up_s) + self.latency_s

    @property
    def at_once_s(self) -> float:
        """All workers get their weights together, and send together."""
        return self.down_s + self.up_s

    @property
    def in_turn_s(self) -> float:
        """Workers get them one after another, and one sends while others compute: nothing can be faster."""
        return max(self.down_s, self.up_s) + self.one_s


def star_of(numel: int, vectors: float, cluster: Cluster) -> Star:
    """Of a round in full precision."""
    inside = cluster.nodes == 1
    link = cluster.local if inside else cluster.link
    workers = cluster.world_size - 1
    away = workers if inside else cluster.world_size - cluster.ranks_per_node
    size = ELEMENT * float(numel)
    one = size / link.bytes_per_second
    return Star(
        away * one + link.latency_s,
        away * vectors * one + link.latency_s,
        (1 + vectors) * one + 2 * link.latency_s,
        away * size * max(1.0, vectors),
        link.latency_s,
    )


def predict_coordinated(
    name: str,
    work: Workload,
    cluster: Cluster,
    jitter: float = 0.05,
    slowness: Sequence[float] | None = None,
) -> Prediction:
    """One rank coordinates, the others work. ``compute_s`` is what of a step's computing ends up in the weights.

    Args:
        name: of a registered scheme, with default settings.
        work: a rank's step.
        cluster: of all ranks.
        jitter: sigma of the logarithm of steps' times, which are independent: there are no other stragglers.
        slowness: how many times ``work.compute_s`` each worker takes; None: all take as long.

    Raises:
        CoordinationError: see :func:`method_of`; fewer than three ranks.
    """
    if cluster.world_size < FEWEST:
        raise CoordinationError(
            f"scheme {name!r} wants {FEWEST} ranks, a coordinator and two workers; there are {cluster.world_size}"
        )
    workers = cluster.world_size - 1
    normal = np.random.RandomState(0).standard_normal((_ROUNDS, workers))
    times: Array = work.compute_s * np.exp(jitter * normal)
    if slowness is not None:
        times = times * np.asarray(slowness)
    method = method_of(name, workers)
    star = star_of(work.shapes.numel, vectors_of(method), cluster)
    computing = play(method, times, _ROUNDS).step_s
    played = play(method, times, _ROUNDS, star)
    useful = work.compute_s * played.used / cluster.world_size
    off = MODEL_ERROR + cluster.link.spread
    # Between all at once and one after another a network does what it does.
    step, size = played.step_s, ELEMENT * float(work.shapes.numel)
    return Prediction(
        scheme=name,
        sync_every=1,
        step_s=step,
        low_s=computing * (1 - work.spread) + (1 - off) * star.in_turn_s,
        high_s=computing * (1 + work.spread) + (1 + off) * star.at_once_s,
        compute_s=useful,
        exposed_s=step - useful,
        sync_s=star.at_once_s,
        compression_s=0.0,
        wire_bytes=played.vectors * size,
        link_bytes=star.link_bytes,
        peak_bytes_per_s=star.link_bytes / work.compute_s,
        memory_bytes=work.shapes.numel * (work.bytes_per_parameter + ELEMENT),
    )

"""Which scheme and which parameters: by replaying recorded times through each candidate's rounds.

The parameters of sequential gradient coding have no formula; the paper's way (Krishnan et al. 2023, section 4)
is to record a few dozen uncoded rounds, and to ask of every candidate how long they would have taken with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .families import CodeFamily, is_usable, make_code
from .mu_rule import MuRule
from .multiplexed import MSGC
from .schedule import Schedule
from .sequential import SRSGC, GradientCoding

Array = npt.NDArray[np.float64]
Scheme = Literal["gradient_coding", "sr_sgc", "m_sgc"]


@dataclass(frozen=True, eq=False)
class DelayProfile:
    """Times of workers, round by round, and what they would be with more or less work.

    Args:
        seconds: ``(rounds, n)``, each worker's time for its part of a round, > 0.
        load: the share of a job's data that each worker computed meanwhile; 1/n without redundancy.
        slope: seconds per unit of load, see :func:`fit_slope`. 0: times do not depend on the load.

    Raises:
        ValueError: a shape or a number is out of range.
    """

    seconds: Array
    load: float
    slope: float

    def __post_init__(self) -> None:
        if self.seconds.ndim != 2 or not self.seconds.size:
            raise ValueError(
                f"seconds has shape {self.seconds.shape}, which must be (rounds, workers), none of them 0"
            )
        if not (self.seconds > 0).all():
            raise ValueError(f"seconds has a time of {self.seconds.min():g}; all must be > 0")
        if not 0 < self.load <= 1 or not self.slope >= 0:
            raise ValueError(
                f"load={self.load} must be in (0, 1] and slope={self.slope} must be >= 0"
            )

    @property
    def num_rounds(self) -> int:
        return len(self.seconds)

    @property
    def num_workers(self) -> int:
        return int(self.seconds.shape[1])

    def at(self, round: int, load: float) -> Array:
        """``(n,)``: times of ``round``, which starts over after the last, at another load."""
        seconds: Array = self.seconds[round % self.num_rounds] + self.slope * (load - self.load)
        # A line fitted to noisy times may cross zero far from where it was fitted.
        return seconds.clip(1e-3 * float(self.seconds.min()))


def fit_slope(loads: Array, seconds: Array) -> float:
    """Seconds per unit of load, by least squares with an intercept; 0 rather than negative.

    Args:
        loads: ``(m,)``, at least two different ones.
        seconds: ``(m,)``, for example the median over workers and rounds at each load.

    Raises:
        ValueError: all loads are equal.
    """
    if not np.ptp(loads):
        raise ValueError(
            f"loads are all {loads[0]:g}, which says nothing about a slope; record rounds at two loads or more"
        )
    centred = loads - loads.mean()
    return max(float(centred @ (seconds - seconds.mean()) / (centred @ centred)), 0.0)


@dataclass(frozen=True)
class Candidate:
    """A scheme with its parameters.

    Args:
        scheme: its name.
        stragglers: s of gradient coding, lambda of the others.
        burst, rounds: B and W; 1 for gradient coding, where they mean nothing.
    """

    scheme: Scheme
    stragglers: int
    burst: int = 1
    rounds: int = 1

    def code_stragglers(self, num_workers: int) -> int | None:
        """s of the code that it needs; None: it needs none."""
        if self.scheme == "sr_sgc":
            return SRSGC.code_stragglers(num_workers, self.burst, self.rounds, self.stragglers)
        if self.scheme == "m_sgc" and self.stragglers == num_workers:
            return None
        return self.stragglers

    def build(
        self, num_workers: int, num_jobs: int | None, code: str | CodeFamily | None = "auto"
    ) -> Schedule:
        """Its schedule.

        Args:
            code: family of the code; None: only count.

        Raises:
            ValueError: the parameters, or the code, do not exist for so many workers.
        """
        needed = self.code_stragglers(num_workers)
        made = None if code is None or needed is None else make_code(num_workers, needed, code)
        if self.scheme == "gradient_coding":
            return GradientCoding(num_workers, self.stragglers, made, num_jobs)
        kind = SRSGC if self.scheme == "sr_sgc" else MSGC
        return kind(num_workers, self.burst, self.rounds, self.stragglers, made, num_jobs)


@dataclass(frozen=True)
class Replayed:
    """What a schedule would have done in recorded rounds.

    Args:
        candidate: which one.
        load: its normalised load.
        delay: T.
        durations: seconds of each round.
        late: how many workers each round closed without.
    """

    candidate: Candidate
    load: float
    delay: int
    durations: tuple[float, ...]
    late: tuple[int, ...]

    @property
    def total(self) -> float:
        """Seconds until the last job is decoded."""
        return sum(self.durations)


def replay(
    candidate: Candidate,
    profile: DelayProfile,
    rule: MuRule,
    num_jobs: int,
    code: str | CodeFamily | None = None,
) -> Replayed:
    """The coordinator's rounds with recorded times; see :class:`Schedule` for the loop."""
    schedule = candidate.build(profile.num_workers, num_jobs, code)
    durations, late = [], []
    for r in range(num_jobs + schedule.delay):
        seconds, absent = rule.close(profile.at(r, schedule.load).tolist(), schedule.fits)
        schedule.record(absent)
        durations.append(seconds)
        late.append(len(absent))
    return Replayed(candidate, schedule.load, schedule.delay, tuple(durations), tuple(late))


def candidates(
    num_workers: int,
    max_delay: int,
    max_stragglers: int | None = None,
    usable: Callable[[int, int], bool] = is_usable,
) -> Iterator[Candidate]:
    """All schemes with all parameters worth a try.

    Args:
        num_workers: n.
        max_delay: largest T: jobs that can be under way, less one.
        max_stragglers: largest s and lambda; None: n/2.
        usable: whether there is a code for (n, s) whose sums can be decoded in practice.
    """
    most = num_workers // 2 if max_stragglers is None else min(max_stragglers, num_workers)
    good = [s for s in range(min(most, num_workers - 1) + 1) if usable(num_workers, s)]
    for s in good:
        yield Candidate("gradient_coding", s)
    for burst in range(1, max_delay + 1):
        for rounds in range(burst + 1, max(burst + 1, 2 * max_delay + 1) + 1, burst):
            # Of all lambda with the same s, the largest tolerates most at the same cost.
            span = rounds - 1 + burst
            for s in good:
                stragglers = min(s * span // burst, num_workers)
                if s and stragglers:
                    yield Candidate("sr_sgc", stragglers, burst, rounds)
    for burst in range(1, max_delay + 2):
        for rounds in range(burst + 1, max_delay - burst + 3):
            for stragglers in (*(s for s in good if s), num_workers):
                yield Candidate("m_sgc", stragglers, burst, rounds)


def select(
    profile: DelayProfile,
    tried: Iterable[Candidate],
    rule: MuRule | None = None,
    num_jobs: int | None = None,
    code: str | CodeFamily | None = None,
) -> list[Replayed]:
    """Replays of all candidates, the fastest first; of equals, the one with less delay and load.

    Args:
        profile: recorded times. Record again every few thousand rounds: networks change.
        tried: for example :func:`candidates`.
        rule: how long to wait; mu = 1 by default.
        num_jobs: J; as many as rounds were recorded by default.
        code: family with which decodability is judged; None counts, which knows no luck.

    Raises:
        ValueError: nothing to try.
    """
    rule, jobs = rule or MuRule(), num_jobs or profile.num_rounds
    done = [replay(candidate, profile, rule, jobs, code) for candidate in tried]
    if not done:
        raise ValueError("tried is empty; give candidates(num_workers, max_delay)")
    return sorted(done, key=lambda r: (r.total, r.delay, r.load))

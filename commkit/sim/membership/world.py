"""One simulated run: workers, faults from the seed, and what must hold at the end."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ...membership import ElasticOptions
from ..clock import VirtualClock
from .judge import Judge
from .network import STORE, VirtualNetwork, VirtualStore
from .worker import SimWorker

_FAULTS_END_S = 20.0
_SETTLED_S = 120.0
_OPTIONS = ElasticOptions(
    min_workers=2,
    heartbeat_s=0.5,
    limit_s=2.0,
    start_s=5.0,
    grace_s=3.0,
    step_limit_s=4.0,
    max_tries=20,
    poll_s=0.2,
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run.

    Args:
        seed: its number.
        workers: that ever took part or tried.
        epochs: sets of members.
        steps: that were made real.
        faults: that were injected, by name.
        stop: why training stopped early; empty if it was finished.
    """

    seed: int
    workers: int
    epochs: int
    steps: int
    faults: dict[str, int]
    stop: str


class World:
    """
    Args:
        seed: decides everything.
        size: workers at the start; None: 2 to 7, by the seed.
        steps: to train.
    """

    def __init__(self, seed: int, size: int | None = None, steps: int = 16) -> None:
        self.random = random.Random(seed)
        self.size = self.random.randint(2, 7) if size is None else size
        self.clock = VirtualClock()
        self.judge = Judge(seed)
        slowness_s = self.random.choice([0.001, 0.01, 0.1])
        self.network = VirtualNetwork(self.clock, self.random, slowness_s)
        self.store = VirtualStore(self.network)
        self.workers: dict[str, SimWorker] = {}
        self.faults: dict[str, int] = {}
        self._steps = steps
        self._kinds: dict[str, Callable[[SimWorker], None]] = {
            "kill": lambda w: w.kill(noticed=True),
            "vanish": lambda w: w.kill(noticed=False),
            "pause": lambda w: w.pause(self.random.uniform(0.1, 6.0)),
            "exception": SimWorker.give_up,
            "cut from the store": lambda w: self._cut([(w.name, STORE), (STORE, w.name)]),
            "cut from a peer": lambda w: self._cut([(w.name, self._any().name)]),
            "partition": lambda _: self._partition(),
            "join": lambda _: self._start_worker(),
        }
        for place in range(self.size):
            self.clock.after(self.random.uniform(0, 1), partial(self._start_worker, place))
        for _ in range(self.random.randint(0, 8)):
            self.clock.after(self.random.uniform(0, _FAULTS_END_S), self._inject)

    def run(self) -> Outcome:
        """
        Raises:
            InvariantError: a promise was broken.
        """
        self.clock.run(_FAULTS_END_S)
        while self.clock.now < _SETTLED_S and any(w.active for w in self.workers.values()):
            self.clock.run(self.clock.now + 1.0)
        still = [w.name for w in self.workers.values() if w.active]
        self.judge.require(
            not still, f"{still} still wait {_SETTLED_S - _FAULTS_END_S:g} s after the last fault"
        )
        stops = {w.member.view.stop for w in self.workers.values() if not w.dead} - {""}
        finished = any(w.real == self._steps for w in self.workers.values())
        alive = [w for w in self.workers.values() if not (w.dead or w.member.evicted)]
        gave_up = all(w.member.has_left for w in alive)
        self.judge.require(bool(stops) or finished or gave_up, "training neither ended nor stopped")
        return Outcome(
            self.judge.seed,
            len(self.workers),
            len(self.judge.views),
            len(self.judge.values),
            self.faults,
            min(stops, default=""),
        )

    def _start_worker(self, place: int = 0) -> None:
        name = f"w{len(self.workers)}"
        self.workers[name] = SimWorker(
            name,
            place,
            self.size,
            self._steps,
            _OPTIONS,
            self.network,
            self.store,
            self.judge,
            self.workers,
        )

    def _any(self) -> SimWorker:
        return self.random.choice(list(self.workers.values()))

    def _inject(self) -> None:
        if self.workers:
            kind = self.random.choice(list(self._kinds))
            self.faults[kind] = self.faults.get(kind, 0) + 1
            self._kinds[kind](self._any())

    def _cut(self, links: list[tuple[str, str]]) -> None:
        self.network.cut.update(links)
        longest = _FAULTS_END_S - self.clock.now
        self.clock.after(
            min(longest, self.random.uniform(0.1, 8.0)),
            lambda: self.network.cut.difference_update(links),
        )

    def _partition(self) -> None:
        """Some on one side, the others and perhaps the store on the other."""
        names = [*self.workers, STORE]
        here = {n for n in names if self.random.random() < 0.5}
        self._cut(
            [(a, b) for a in names for b in names if (a in here) != (b in here)],
        )


def simulate(seed: int, size: int | None = None) -> Outcome:
    """Run one scenario to its end.

    Raises:
        InvariantError: a promise was broken.
    """
    return World(seed, size).run()

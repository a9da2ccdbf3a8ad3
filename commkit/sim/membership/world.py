"""One simulated run: workers, faults from the seed, and what must hold at the end."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

from ...membership import ElasticOptions, decode
from ..clock import VirtualClock
from .judge import Judge
from .network import STORE, VirtualNetwork, VirtualStore
from .worker import SimWorker

_FAULTS_END_S = 20.0
# A pair that is cut off for ever takes max_tries of up to 8 s with each set of members.
_SETTLED_S = 500.0
_HEARTBEAT_S = 0.5
_FAST_S = 0.01  # networks with which the judge may demand that nobody is left out for nothing
# At which a fault may strike: kinds of records, as they are written to the log and before their author knows, and what
# workers do.
_MOMENTS = (
    *("Join", "Leave", "Alarm", "Ready", "View"),
    *("enters", "sends the state", "has the state", "has prepared", "has committed"),
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
        faults: kinds to choose from; None: all.
    """

    def __init__(
        self,
        seed: int,
        size: int | None = None,
        steps: int = 16,
        faults: Collection[str] | None = None,
    ) -> None:
        self.random = random.Random(seed)
        self.size = self.random.randint(2, 7) if size is None else size
        self.clock = VirtualClock()
        slowness_s = self.random.choice([0.001, 0.01, 0.1])
        self.options = self._draw_options()
        self.judge = Judge(
            seed,
            patient_s=self.options.limit_s - 4 * _HEARTBEAT_S,
            min_workers=self.options.min_workers,
            fair=slowness_s <= _FAST_S,
        )
        self.network = VirtualNetwork(self.clock, self.random, slowness_s)
        self.store = VirtualStore(self.network, self._appended)
        self.workers: dict[str, SimWorker] = {}
        self.faults: dict[str, int] = {}
        self._steps = steps
        self._snares: list[tuple[str, int, str]] = []  # moment, how many of them to let pass, fault
        self._drawn = [kind for kind in FAULTS if faults is None or kind in faults]
        for place in range(self.size):
            self.clock.after(self.random.uniform(0, 1), partial(self._start_worker, place))
        for _ in range(self.random.randint(0, 8)):
            self.clock.after(self.random.uniform(0, _FAULTS_END_S), self._inject)
        if faults is None and self.random.random() < 0.03:
            self.clock.after(self.random.uniform(0, _FAULTS_END_S), self._lose_store)

    def _draw_options(self) -> ElasticOptions:
        draw = self.random.choice
        return ElasticOptions(
            min_workers=draw([1, 2, 2, 3]),
            heartbeat_s=_HEARTBEAT_S,
            limit_s=draw([2.0, 4.0]),
            start_s=5.0,
            grace_s=draw([0.0, 3.0]),
            step_limit_s=draw([None, 4.0, 8.0]),
            max_tries=draw([3, 8]),
            poll_s=0.2,
        )

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
        alive = [
            w for w in self.workers.values() if not (w.dead or w.member.evicted or w.lost_store)
        ]
        gave_up = all(w.member.has_left for w in alive)
        self.judge.require(bool(stops) or finished or gave_up, "training neither ended nor stopped")
        for worker in self.workers.values():
            worker.tell_end()
        return Outcome(
            self.judge.seed,
            len(self.workers),
            len(self.judge.views),
            len(self.judge.values),
            self.faults,
            "the store is lost" if self.store.lost else min(stops, default=""),
        )

    def _start_worker(self, place: int = 0) -> None:
        name = f"w{len(self.workers)}"
        self.workers[name] = SimWorker(
            name,
            place,
            self.size,
            self._steps,
            self.options,
            self.network,
            self.store,
            self.judge,
            self.workers,
            self._reached,
        )

    def _any(self) -> SimWorker:
        return self.random.choice(list(self.workers.values()))

    # Faults.

    def _count(self, kind: str) -> None:
        self.faults[kind] = self.faults.get(kind, 0) + 1

    def _inject(self) -> None:
        if self.workers:
            kind = self.random.choice(self._drawn)
            self._count(kind)
            FAULTS[kind](self, self._any())

    def _strike(self, fault: str, worker: SimWorker) -> None:
        if fault == "kill":
            worker.kill(noticed=True)
        elif fault == "vanish":
            worker.kill(noticed=False)
        elif fault == "pause":
            worker.pause(self.random.uniform(0.1, 6.0))
        else:
            self._cut([(worker.name, STORE), (STORE, worker.name)])

    def _lay_snare(self, fault: str) -> None:
        self._snares.append((self.random.choice(_MOMENTS), self.random.randint(0, 5), fault))

    def _appended(self, worker: str, text: str) -> None:
        self._reached(type(decode(text)).__name__, self.workers[worker])

    def _reached(self, moment: str, worker: SimWorker) -> None:
        """Strike whoever steps into a snare, before anything else happens."""
        left = []
        for at, let_pass, fault in self._snares:
            if at == moment and not let_pass:
                self.clock.after(0.0, partial(self._strike, fault, worker))
            else:
                left.append((at, let_pass - (at == moment), fault))
        self._snares = left

    def _pause_everybody(self) -> None:
        """As when the machine that they share sleeps, or is moved. Some wake a little later than others."""
        seconds = self.random.uniform(0.5, 8.0)
        self.store.pause(seconds)
        for worker in self.workers.values():
            worker.pause(seconds + self.random.uniform(0.0, 0.3), alone=False)

    def _lose_store(self) -> None:
        self._count("store lost")
        self.store.lost = True

    def _return(self, worker: SimWorker) -> None:
        """A worker ends, and its launcher starts another in its place."""
        worker.kill(noticed=True)
        self.clock.after(self.random.uniform(0.0, 3.0), partial(self._start_worker, worker.place))

    def _cut(self, links: list[tuple[str, str]]) -> None:
        longest = max(0.0, _FAULTS_END_S - self.clock.now)
        seconds = min(longest, self.random.uniform(0.1, 8.0))
        for name in {name for link in links if STORE in link for name in link} - {STORE}:
            self.judge.hit(name, seconds + 0.2)  # until messages are tried again
        self.network.cut.update(links)
        self.clock.after(seconds, lambda: self.network.cut.difference_update(links))

    def _cut_for_ever(self, worker: SimWorker) -> None:
        """Only with a limit for steps: without one, whoever waits there waits for its network."""
        if self.options.step_limit_s is not None:
            name = self._any().name
            self.network.cut.update([(worker.name, name), (name, worker.name)])

    def _partition(self) -> None:
        """Some on one side, the others and perhaps the store on the other."""
        names = [*self.workers, STORE]
        here = {n for n in names if self.random.random() < 0.5}
        self._cut(
            [(a, b) for a in names for b in names if (a in here) != (b in here)],
        )


def _short_pause(world: World, worker: SimWorker) -> None:
    worker.pause(world.random.uniform(0.05, 0.5))


def _two_killed(world: World, worker: SimWorker) -> None:
    worker.kill(noticed=True)
    world._any().kill(noticed=True)


# What may happen, given the world and a worker.
FAULTS: dict[str, Callable[[World, SimWorker], None]] = {
    "kill": lambda world, w: world._strike("kill", w),
    "vanish": lambda world, w: world._strike("vanish", w),
    "pause": lambda world, w: world._strike("pause", w),
    "short pause": _short_pause,
    "exception": lambda _, w: w.give_up(),
    "two killed at once": _two_killed,
    "killed in the act": lambda world, _: world._lay_snare("kill"),
    "vanished in the act": lambda world, _: world._lay_snare("vanish"),
    "paused in the act": lambda world, _: world._lay_snare("pause"),
    "cut off in the act": lambda world, _: world._lay_snare("cut from the store"),
    "everybody paused": lambda world, _: world._pause_everybody(),
    "store paused": lambda world, _: world.store.pause(world.random.uniform(0.5, 8.0)),
    "cut from the store": lambda world, w: world._strike("cut from the store", w),
    "cut from a peer": lambda world, w: world._cut([(w.name, world._any().name)]),
    "cut from a peer for ever": lambda world, w: world._cut_for_ever(w),
    "connection reset": lambda world, w: w.reset(world._any()),
    "failed exchange": lambda _, w: w.stumble(),
    "partition": lambda world, _: world._partition(),
    "join": lambda world, _: world._start_worker(),
    "return": lambda world, w: world._return(w),
}


def simulate(seed: int, size: int | None = None, faults: Collection[str] | None = None) -> Outcome:
    """Run one scenario to its end.

    Args:
        seed: decides everything.
        size: workers at the start; None: 2 to 7, by the seed.
        faults: kinds to choose from; None: all.

    Raises:
        InvariantError: a promise was broken.
    """
    return World(seed, size, faults=faults).run()

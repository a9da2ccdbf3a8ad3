"""One simulated run of local updates: workers, faults from the seed, and what must hold at the end."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...aggregators import AllGather
from ...compressors import TopK
from ...feedback import ErrorFeedback
from ...membership import ElasticOptions, MembershipError, TrainingStopped, View, WorkerEvicted
from ...outer import CO2, DiLoCo, LocalSGD, NoLoCo, StreamingDiLoCo
from ...outer.base import OuterSync
from ...outer.following import Follower
from ...reducer import Reducer
from ...runtime.alarm import NoAlarm
from ..clock import VirtualClock
from ..membership.judge import InvariantError, Judge
from ..membership.network import VirtualNetwork
from .elastic import VirtualElastic, VirtualWorker
from .group import VirtualGroup
from .store import StoreClient, StoreHost
from .turns import Process, Stuck, Turns

STEPS, SYNC_EVERY = 12, 3
_HEARTBEAT_S = 0.5
_FAULTS_END_S, _SETTLED_S = 12.0, 300.0


def _topk() -> Reducer:
    return Reducer(AllGather(TopK(density=0.3)), feedback=ErrorFeedback())


METHODS: dict[str, Callable[..., OuterSync]] = {
    "diloco": partial(DiLoCo, sync_every=SYNC_EVERY),
    "diloco, top-k": lambda *a, **k: DiLoCo(*a, sync_every=SYNC_EVERY, reducer=_topk(), **k),
    "local_sgd, top-k": lambda *a, **k: LocalSGD(*a, sync_every=SYNC_EVERY, reducer=_topk(), **k),
    "streaming_diloco": partial(StreamingDiLoCo, sync_every=4, fragments=2, overlap=1),
    "co2": partial(CO2, sync_every=SYNC_EVERY),
    "noloco": partial(NoLoCo, sync_every=SYNC_EVERY),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run.

    Args:
        seed: its number.
        method: of the local updates.
        epochs: sets of members.
        rounds: that counted.
        faults: that were injected, by name.
        ends: how workers ended, and how many.
    """

    seed: int
    method: str
    epochs: int
    rounds: int
    faults: dict[str, int]
    ends: dict[str, int]


class World:
    """
    Args:
        seed: decides everything.
        method: of :data:`METHODS`; None: by the seed.
    """

    def __init__(self, seed: int, method: str | None = None) -> None:
        self.random = random.Random(seed)
        self.clock = VirtualClock()
        self.turns = Turns(self.clock, self.random)
        self.network = VirtualNetwork(self.clock, self.random, self.random.choice([0.001, 0.01]))
        self.options = ElasticOptions(
            min_workers=self.random.choice([1, 2]),
            heartbeat_s=_HEARTBEAT_S,
            limit_s=self.random.choice([2.0, 4.0]),
            start_s=5.0,
            grace_s=self.random.choice([0.0, 3.0]),
            poll_s=0.1,
        )
        patient_s = self.options.limit_s - 4 * _HEARTBEAT_S
        self.judge = Judge(seed, patient_s, self.options.min_workers)
        self.method = self.random.choice(list(METHODS)) if method is None else method
        self.store = StoreHost()
        self.size = self.random.randint(2, 4)
        self.processes: dict[str, Process] = {}
        self.groups_of: dict[str, tuple[VirtualGroup, int]] = {}
        self.ends: dict[str, str] = {}
        self.last: dict[str, tuple[int, int, int]] = {}
        self.rounds: dict[int, int] = {}  # what each came to
        self.faults: dict[str, int] = {}
        self._groups: dict[int, VirtualGroup] = {}
        kinds: list[Callable[[], str]] = [
            self._kill, self._kill, self._vanish, self._pause, self._join, self._stop_store, self._raise,
        ]  # fmt: skip
        for place in range(self.size):
            self.clock.after(self.random.uniform(0, 0.5), partial(self._start, place))
        for _ in range(self.random.randint(0, 4)):
            at = self.random.uniform(0, _FAULTS_END_S)
            self.clock.after(at, partial(self._inject, self.random.choice(kinds)))

    def run(self) -> Outcome:
        """
        Raises:
            InvariantError: a promise was broken.
        """
        try:
            self.clock.run(0.5)
            self.turns.run(_SETTLED_S)
        except Stuck as stuck:
            self.judge.require(False, f"{self.method}: {stuck}")
        finally:
            self.turns.end()
        well = [name for name, how in self.ends.items() if how == "well"]
        for name in well:
            self.judge.require(
                self.last[name] == self.last[well[0]],
                f"{self.method}: {name} ended otherwise: {self.last}",
            )
        counts: dict[str, int] = {}
        for how in self.ends.values():
            counts[how] = counts.get(how, 0) + 1
        epochs = len(self.judge.views)
        return Outcome(self.judge.seed, self.method, epochs, len(self.rounds), self.faults, counts)

    # What workers ask for.

    def store_of(self, process: Process) -> StoreClient:
        return StoreClient(self.store, process.name, self.turns, self.network)

    def group_of(self, view: View) -> VirtualGroup:
        if view.epoch not in self._groups:
            self._groups[view.epoch] = VirtualGroup(view.members, self.turns, self.network)
        return self._groups[view.epoch]

    def saw_round(self, worker: str, number: int, anchors: Mapping[str, Tensor] | None) -> None:
        """``worker`` has applied the outcome of a round."""
        if anchors is None or self.method == "noloco":
            return
        value = _digest(anchors)
        first = self.rounds.setdefault(number, value)
        self.judge.require(
            first == value, f"{self.method}: {worker} makes another round {number} of it"
        )

    # Workers.

    def _start(self, place: int) -> None:
        process = Process(f"w{len(self.processes)}")
        self.processes[process.name] = process
        self.turns.start(process, "training", partial(self._train, process, place))

    def _train(self, process: Process, place: int) -> None:
        try:
            self.last[process.name] = _train(self, process, place)
            end = "well"
        except WorkerEvicted:
            end = "evicted"
        except TrainingStopped:
            end = "stopped"
        except MembershipError as error:
            end = str(error)
        except _Stumble:
            end = "raised"
        except InvariantError:
            raise
        except Exception as error:
            raise InvariantError(
                f"seed {self.judge.seed}: {self.method}: {process.name} raised {type(error).__name__}: {error}"
            ) from error
        self.ends[process.name] = end

    # Faults.

    def _inject(self, fault: Callable[[], str]) -> None:
        if self.processes:
            kind = fault()
            self.faults[kind] = self.faults.get(kind, 0) + 1

    def _any(self) -> Process:
        return self.random.choice(list(self.processes.values()))

    def _kill(self) -> str:
        process = self._vanishing()
        if process.name in self.groups_of:
            group, rank = self.groups_of[process.name]
            group.end(rank)
        return "kill"

    def _vanish(self) -> str:
        self._vanishing()
        return "vanish"

    def _vanishing(self) -> Process:
        process = self._any()
        self.judge.hit(process.name, float("inf"))
        process.dead = True
        self.network.ended.add(process.name)
        return process

    def _pause(self) -> str:
        process, seconds = self._any(), self.random.uniform(0.1, 6.0)
        self.judge.hit(process.name, seconds)
        process.resumes = self.clock.now + seconds
        return "pause"

    def _join(self) -> str:
        self._start(0)
        return "join"

    def _stop_store(self) -> str:
        self.store.resumes = self.clock.now + self.random.uniform(0.5, 6.0)
        return "store paused"

    def _raise(self) -> str:
        process = self._any()
        self.judge.hit(process.name, float("inf"))
        process.stumbles = True
        return "exception"


class _Stumble(ValueError):
    """A bad sample."""


def _digest(tensors: Mapping[str, Tensor]) -> int:
    return zlib.crc32(b"".join(x.detach().numpy().tobytes() for x in tensors.values()))


def _virtual(kind: type[OuterSync], world: World, process: Process) -> type[OuterSync]:
    """``kind`` in this world."""

    class Virtual(kind):  # type: ignore[misc,valid-type]
        def _join(self, group: Any) -> Any:
            comm = self.members.comm
            return comm, comm.split([list(range(comm.world_size))], "outer"), NoAlarm()

        def make_worker(self, alarm: Any) -> Any:
            return VirtualWorker(world.turns, process)

        def apply(self, unit: Any, mean: dict[str, Tensor]) -> None:
            super().apply(unit, mean)
            world.saw_round(process.name, _number_of(self, unit), self.anchors.values)

    Virtual.__name__ = kind.__name__
    return Virtual


def _number_of(method: OuterSync, unit: Any) -> int:
    """Of applied rounds of ``unit``, as a name for their outcome."""
    counts = method.__dict__.setdefault("applied", {})
    counts[unit.index] = counts.get(unit.index, 0) + 1
    return 1000 * unit.index + method.step


def _train(world: World, process: Process, place: int) -> tuple[int, int, int]:
    """Steps, rounds and what the weights come to."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with VirtualElastic(world.options, world, process, place, world.size) as members:
        made = METHODS[world.method](model, optimizer)
        made.__class__ = _virtual(type(made), world, process)
        made.members = members
        members.add(Follower(made))
        for step in members.steps(STEPS, model=model, optimizer=optimizer):
            with step:
                world.turns.sleep(world.random.uniform(0.05, 0.6))
                if process.stumbles:
                    raise _Stumble
                optimizer.zero_grad()
                x = torch.randn(
                    4, 3, generator=torch.Generator().manual_seed(100 * step.number + place)
                )
                (model(x) - x[:, :2]).square().mean().backward()
                optimizer.step()
        made.close()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return made.step, made.round, _digest(weights)


def simulate(seed: int, method: str | None = None) -> Outcome:
    """Run one scenario to its end.

    Raises:
        InvariantError: a promise was broken.
    """
    return World(seed, method).run()

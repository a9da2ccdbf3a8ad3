"""One simulated run of local updates: workers, faults from the seed, and what must hold at the end."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ...adapters.at_step import StepHandle
from ...membership import ElasticOptions, MembershipError, TrainingStopped, View, WorkerEvicted
from ..clock import VirtualClock
from ..membership.judge import InvariantError, Judge
from ..membership.network import VirtualNetwork
from .attached import ROUNDS, STEPS, attach
from .elastic import VirtualElastic
from .group import VirtualGroup
from .store import StoreClient, StoreHost
from .turns import Process, Stuck, Turns

METHODS = (*ROUNDS, *STEPS)
_TOTAL = 12
_HEARTBEAT_S = 0.5
_FAULTS_END_S, _SETTLED_S = 12.0, 300.0


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
        self.method = self.random.choice(METHODS) if method is None else method
        self.store = StoreHost()
        self.size = self.random.randint(2, 4)
        self.processes: dict[str, Process] = {}
        self.groups_of: dict[str, tuple[VirtualGroup, int]] = {}
        self.ends: dict[str, str] = {}
        self.last: dict[str, tuple[int, ...]] = {}
        self._weights = torch.zeros(0)
        self.rounds: dict[int, int] = {}  # what each came to
        self.steps: dict[int, tuple[int, list[int]]] = {}  # the same, and who contributed
        self.places: dict[str, int] = {}
        self._made: dict[str, int] = {}
        self.faults: dict[str, int] = {}
        self.broken: list[InvariantError] = []
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
        if self.broken:
            raise self.broken[0]
        well = [name for name, how in self.ends.items() if how == "well"]
        for name in well:
            self.judge.require(
                self.last[name] == self.last[well[0]],
                f"{self.method}: {name} ended otherwise: {self.last}",
            )
        if self.method == "ddp" and well:
            self._require_exact()
        counts: dict[str, int] = {}
        for how in self.ends.values():
            counts[how] = counts.get(how, 0) + 1
        epochs = len(self.judge.views)
        rounds = len(self.rounds) + len(self.steps)
        return Outcome(self.judge.seed, self.method, epochs, rounds, self.faults, counts)

    def _require_exact(self) -> None:
        """Each contribution counts once: the weights are those of training on one device."""
        model, optimizer = _model()
        for step in range(_TOTAL):
            _, places = self.steps[step]
            optimizer.zero_grad()
            for place in places:
                (_loss(model, step, place) / len(places)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        exact = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        difference = float((exact - self._weights).abs().max())
        self.judge.require(difference < 1e-5, f"ddp: weights are {difference:.1e} from exact ones")

    # What workers ask for.

    def store_of(self, process: Process) -> StoreClient:
        return StoreClient(self.store, process.name, self.turns, self.network)

    def group_of(self, view: View) -> VirtualGroup:
        if view.epoch not in self._groups:
            self._groups[view.epoch] = VirtualGroup(view.members, self.turns, self.network)
        return self._groups[view.epoch]

    def saw_round(self, worker: str, number: int, anchors: Mapping[str, Tensor]) -> None:
        """``worker`` has applied the outcome of a round."""
        if self.method == "noloco":  # of which each replica has its own
            return
        value = _digest(anchors)
        first = self.rounds.setdefault(number, value)
        self.judge.require(
            first == value, f"{self.method}: {worker} has another outcome of round {number}"
        )

    def saw_step(self, worker: str, step: int, places: list[int], model: nn.Module) -> None:
        """``worker`` has made ``step`` together with the workers at ``places``."""
        before = self._made.get(worker)
        self.judge.require(
            before is None or step == before + 1,
            f"{self.method}: {worker} makes step {step} after {before}",
        )
        self._made[worker] = step
        if self.method in STEPS:
            value = _digest(dict(model.named_parameters()))
            first = self.steps.setdefault(step, (value, places))
            self.judge.require(
                first == (value, places),
                f"{self.method}: {worker} makes another step {step}: {first} and {(value, places)}",
            )

    # Workers.

    def places_of(self, names: Sequence[str]) -> list[int]:
        return [self.places[name] for name in names]

    def _start(self, place: int) -> None:
        process = Process(f"w{len(self.processes)}")
        self.places[process.name] = place
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
        process.dead = True  # with the threads that it may have left

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
        self._start(len(self.processes))
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


def _model() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.05)


def _loss(model: nn.Module, step: int, place: int) -> Tensor:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(100 * step + place))
    loss: Tensor = (model(x) - x[:, :2]).square().mean()
    return loss


def _train(world: World, process: Process, place: int) -> tuple[int, ...]:
    """What all who end well have in common."""
    model, optimizer = _model()
    with VirtualElastic(world.options, world, process, place, world.size) as members:
        attached = attach(world, process, members, model, optimizer)
        for step in members.steps(_TOTAL, model=model, optimizer=optimizer):
            number = step.number
            with step:
                world.turns.sleep(world.random.uniform(0.05, 0.6))
                if process.stumbles:
                    raise _Stumble
                optimizer.zero_grad()
                _loss(model, number, place).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                world.saw_step(process.name, number, world.places_of(members.members), model)
        attached.close()
    world._weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    weights = _digest(dict(model.named_parameters()))
    if isinstance(attached, StepHandle):
        return (weights,)
    # Replicas of NoLoCo are merged at the end.
    return attached.step, attached.round, weights


def simulate(seed: int, method: str | None = None) -> Outcome:
    """Run one scenario to its end.

    Raises:
        InvariantError: a promise was broken.
    """
    return World(seed, method).run()

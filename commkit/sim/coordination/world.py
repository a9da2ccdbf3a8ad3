"""One simulated run of training with a coordinator: workers, faults from the seed, and what must hold at the end."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ...runtime.alarm import RankFailure
from ...straggler import (
    Backup,
    Coding,
    CoordinationOptions,
    Coordinator,
    DynamicBackup,
    Method,
    Multiplexed,
    NotDecodable,
    SelectiveRepetition,
    Share,
    StepRecord,
    Worker,
)
from ...straggler import worker as production
from ..clock import VirtualClock
from ..membership.judge import InvariantError
from ..membership.network import VirtualNetwork
from ..processes.turns import Process, Stuck, Turns
from .transport import Ranks

JOBS, BATCH = 10, 48
_FAULTS_END_S, _SETTLED_S = 8.0, 2000.0

# With how many workers each can do without for ever.
METHODS: dict[str, tuple[Method, int]] = {
    "backup": (Backup(num_backups=1), 1),
    "dbw": (DynamicBackup(), 3),
    "coding, s=1": (Coding(1), 1),
    "coding, s=1, mu-rule": (Coding(1, mu=0.5), 1),
    "coding, s=3": (Coding(3), 3),
    "sr_sgc": (SelectiveRepetition(1, 2, 2), 0),
    "m_sgc": (Multiplexed(1, 2, 2), 0),
}
_EXACT = ("coding, s=1", "coding, s=1, mu-rule", "coding, s=3")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run.

    Args:
        seed: its number.
        method: against stragglers.
        steps: that were made.
        late: results that came too late, or never.
        faults: that were injected, by name.
        end: of the coordinator; "well" if all jobs are done.
    """

    seed: int
    method: str
    steps: int
    late: int
    faults: dict[str, int]
    end: str


class World:
    """
    Args:
        seed: decides everything.
        method: of :data:`METHODS`; None: by the seed.
    """

    def __init__(self, seed: int, method: str | None = None) -> None:
        self.seed, self.random = seed, random.Random(seed)
        self.clock = VirtualClock()
        self.turns = Turns(self.clock, self.random)
        self.network = VirtualNetwork(self.clock, self.random, self.random.choice([0.001, 0.02]))
        self.name = self.random.choice(list(METHODS)) if method is None else method
        self.method, self.spare = METHODS[self.name]
        self.coordinators = (0, 1) if self.random.random() < 0.3 else (0,)
        self.ranks = Ranks(len(self.coordinators) + 4, self.turns, self.network)
        self.options = CoordinationOptions(
            coordinators=self.coordinators,
            grace_s=self.random.choice([0.0, 0.1]),
            interrupt=self.random.random() < 0.7,
            max_behind=self.random.choice([1, 4]),
            on_worker_error="continue",
        )
        self.processes = [Process(f"rank {rank}") for rank in range(self.ranks.world_size)]
        self.slow = {rank: self.random.choice([1.0, 1.0, 1.0, 5.0]) for rank in self.workers}
        self.spoilt: set[int] = set()
        self.records: list[StepRecord] = []
        self.ends: dict[int, str] = {}
        self.weights: dict[int, Tensor] = {}
        self.killed: set[int] = set()
        self.faults: dict[str, int] = {}
        kinds = [self._kill, self._pause, self._pause, self._raise, self._spoil, self._slow_down]
        for rank, process in enumerate(self.processes):
            self.turns.start(process, "", partial(self._body, rank, process))
        for _ in range(self.random.randint(0, 5)):
            fault = self.random.choice(kinds)
            self.clock.after(self.random.uniform(0.1, _FAULTS_END_S), partial(self._inject, fault))
        if self.random.random() < 0.05:
            at = self.random.uniform(0.1, _FAULTS_END_S)
            self.clock.after(at, partial(self._kill_rank, self.random.choice(self.coordinators)))

    @property
    def workers(self) -> list[int]:
        return list(range(len(self.coordinators), self.ranks.world_size))

    def require(self, true: bool, what: str) -> None:
        if not true:
            raise InvariantError(f"seed {self.seed}, {self.name}: {what}")

    def run(self) -> Outcome:
        """
        Raises:
            InvariantError: a promise was broken.
        """
        try:
            self.turns.run(_SETTLED_S)
        except Stuck as stuck:
            self.require(False, str(stuck))
        finally:
            self.turns.end()
        end = self.ends.get(0, "killed")
        if self.killed & set(self.coordinators):
            self._judge_without_coordinator()
        elif end == "well":
            self._judge_well()
        else:
            gone = len(self.killed)
            self.require(
                gone > self.spare, f"the coordinator ended with {end}, and {gone} are dead"
            )
        late = sum(len(record.late) for record in self.records)
        return Outcome(self.seed, self.name, len(self.records), late, self.faults, end)

    # What must hold.

    def _judge_without_coordinator(self) -> None:
        """Whoever is left says so."""
        wrong = {
            r: how
            for r, how in self.ends.items()
            if how not in ("well", "RankFailure", "NotDecodable")
        }
        self.require(not wrong, f"a coordinator was killed, and ranks ended with {wrong}")

    def _judge_well(self) -> None:
        jobs = [record.job for record in self.records]
        self.require(jobs == list(range(JOBS)), f"steps were made of jobs {jobs}")
        for rank in self.workers:
            if rank in self.killed:
                continue
            how = self.ends.get(rank)
            self.require(how == "well", f"worker {rank} ended with {how}, and the coordinator well")
            same = torch.equal(self.weights[rank], self.weights[0])
            self.require(same, f"worker {rank} has other weights than the coordinator at the end")
        if self.name in _EXACT and not any(record.skipped for record in self.records):
            difference = float((self.weights[0] - _synchronous()).abs().max())
            self.require(difference < 1e-9, f"weights are {difference:.1e} from exact ones")

    # Ranks.

    def _body(self, rank: int, process: Process) -> None:
        model = _model()
        network = self.ranks.at(rank, process)
        try:
            if rank in self.coordinators:
                self._coordinate(rank, model, network)
            else:
                with Worker(
                    model, self.method, self.options, batch=BATCH, network=network
                ) as worker:
                    worker.run(partial(self._loss, rank, process, model))
            self.ends[rank] = "well"
            self.weights[rank] = _flat(model)
        except _Stumble:
            self.killed.add(rank)  # for the others it is
        except (NotDecodable, RankFailure) as error:
            self.ends[rank] = "NotDecodable" if isinstance(error, NotDecodable) else "RankFailure"
        except Exception as error:
            raise InvariantError(
                f"seed {self.seed}, {self.name}: rank {rank} raised {type(error).__name__}: {error}"
            ) from error

    def _coordinate(self, rank: int, model: nn.Module, network: object) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        coordinator = Coordinator(
            [model],
            [optimizer],
            self.method,
            self.options,
            batch=BATCH,
            network=network,  # type: ignore[arg-type]
            clock=lambda: self.clock.now,
        )
        note = self.records.append if rank == 0 else None
        with coordinator:
            coordinator.run(JOBS, note)

    def _loss(self, rank: int, process: Process, model: nn.Module, share: Share) -> Tensor | None:
        if process.stumbles:
            raise _Stumble
        part = len(share.samples) / BATCH
        seconds = part * self.slow[rank] * self.random.uniform(0.8, 1.2)
        if self.turns.wait(share.superseded, seconds) and self.options.interrupt:
            return None
        loss = _loss_on(model, share.samples)
        if rank in self.spoilt:
            self.spoilt.discard(rank)
            loss = loss * float("inf")
        return loss

    # Faults.

    def _inject(self, fault: Callable[[int], str]) -> None:
        kind = fault(self.random.choice(self.workers))
        self.faults[kind] = self.faults.get(kind, 0) + 1

    def _kill_rank(self, rank: int) -> None:
        process = self.processes[rank]
        if not process.dead and rank not in self.ends:
            process.dead = True
            self.killed.add(rank)
            if rank in self.ranks.transports:
                self.ranks.transports[rank].die()

    def _kill(self, rank: int) -> str:
        self._kill_rank(rank)
        return "kill"

    def _pause(self, rank: int) -> str:
        self.processes[rank].resumes = self.clock.now + self.random.uniform(0.1, 6.0)
        return "pause"

    def _raise(self, rank: int) -> str:
        self.processes[rank].stumbles = True
        return "exception"

    def _spoil(self, rank: int) -> str:
        self.spoilt.add(rank)
        return "inf"

    def _slow_down(self, rank: int) -> str:
        self.slow[rank] *= 5
        return "slow"


class _Stumble(ValueError):
    """A bad sample."""


def _model() -> nn.Module:
    model = nn.Linear(3, 1, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.3, -0.2, 0.1]]))
        model.bias.zero_()
    return model


def _loss_on(model: nn.Module, samples: range) -> Tensor:
    numbers = torch.arange(samples.start, samples.stop, dtype=torch.float64)
    x = torch.stack([(numbers * k).sin() for k in (1.0, 2.0, 3.0)], dim=1)
    loss: Tensor = (model(x)[:, 0] - x.sum(1).cos()).square().mean()
    return loss


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@functools.cache
def _synchronous() -> Tensor:
    """Weights after plain training on one device."""
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for job in range(JOBS):
        optimizer.zero_grad()
        _loss_on(model, range(job * BATCH, (job + 1) * BATCH)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return _flat(model)


def simulate(seed: int, method: str | None = None) -> Outcome:
    """Run one scenario to its end.

    Raises:
        InvariantError: a promise was broken.
    """
    # A DistributedDataParallel is looked for among all objects of the process, and there is none.
    with patch.object(production, "wrapped_in_ddp", lambda parameters: None):
        return World(seed, method).run()

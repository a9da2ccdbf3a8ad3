"""A small problem for coordinated training: float64, so that schemes can be told apart from rounding.

Nothing here goes by the clock of the machine: a test says who is late, and a round goes on until all others have come.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from commkit.sim import ThreadNetwork, run_threads
from commkit.straggler import Coordinator, Method, Share, StepRecord, Worker
from commkit.straggler.options import CoordinationOptions
from commkit.straggler.rounds import FirstK

BATCH = 48
FEATURES = 6
PATIENCE_S = 100.0


class Net(nn.Module):
    """Two layers; the same weights for the same seed."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.one = nn.Linear(FEATURES, 8, dtype=dtype)
        self.two = nn.Linear(8, 1, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=dtype) / 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(torch.tanh(self.one(x)))
        return out


def data(samples: range, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Each sample is a function of its number alone."""
    x = torch.stack([sample(number, dtype) for number in samples])
    return x, x.sum(1, keepdim=True).sin()


@functools.lru_cache(100_000)
def sample(number: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(FEATURES, generator=generator, dtype=dtype)


def loss_on(model: nn.Module, samples: range) -> Tensor:
    dtype = next(model.parameters()).dtype
    x, y = data(samples, dtype)
    return F.mse_loss(model(x), y)


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def synchronous(jobs: int, seed: int = 0, batch: int = BATCH) -> tuple[list[float], nn.Module]:
    """Plain training on one device: losses, and the model."""
    model = Net(seed)
    optimizer = sgd(model)
    losses = []
    for job in range(jobs):
        optimizer.zero_grad()
        loss = loss_on(model, range(job * batch, (job + 1) * batch))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, model


Late = Callable[[int, int], bool]
"""(worker, round) -> whether it never finishes that round."""


def nobody(worker: int, number: int) -> bool:
    return False


class Script:
    """A coordinator's clock that stands almost still until everybody is here who is not to be late in the round, and
    then leaps over every deadline. The first to come takes a second, each next one a millisecond more."""

    LEAP_S = 1e6

    def __init__(self, late: Late) -> None:
        self.late = late
        self.coordinator: Coordinator | None = None
        self._now = 0.0

    def __call__(self) -> float:
        if self.coordinator is None:
            return self._now
        gate, number = self.coordinator.gate, self.coordinator.rounds.number
        on_time = any(not self.late(worker, number) for worker in gate.awaited)
        passed = 1 + 1e-3 * len(gate.arrived) if on_time else self.LEAP_S
        self._now = max(self._now, gate.start + passed)
        return self._now

    def is_turn_of(self, worker: int, number: int) -> bool:
        """Whether all workers before it are here in round ``number``, and it is awaited."""
        assert self.coordinator is not None
        rounds = self.coordinator.rounds
        assert isinstance(rounds, FirstK)
        here = set(range(worker)) <= set(self.coordinator.gate.arrived)
        # Chosen when the first is here, and by the coordinator alone.
        awaited = not worker or (rounds._k is not None and worker < rounds._k)
        # Asked last: as long as the round is open, the others were of this round.
        return here and awaited and rounds.number == number


@dataclass
class Run:
    """What a rank has to say at the end."""

    weights: dict[str, Tensor]
    records: list[StepRecord] = field(default_factory=list)
    rank: Any = None  # the coordinator or worker


def work(worker: Worker, script: Script, in_order: bool = False) -> None:
    """Compute; in rounds in which this worker is late, only wait for the next one."""
    me = place(worker)

    def loss_of(share: Share) -> Tensor | None:
        while script.late(me, worker.round) or (
            in_order and not script.is_turn_of(me, worker.round)
        ):
            if share.superseded():
                return None
            breathe()
        return loss_on(worker.model, share.samples)

    worker.run(loss_of)


def place(worker: Worker) -> int:
    """Its number among the workers."""
    return worker.party.workers.index(worker.party.rank)


def breathe() -> None:
    """Let other threads run."""
    threading.Event().wait(0.001)


def train(
    method: Method,
    num_workers: int,
    jobs: int,
    options: CoordinationOptions | None = None,
    late: Late = nobody,
    *,
    models: int = 1,
    batch: int = BATCH,
    dtype: torch.dtype = torch.float64,
    max_grad_norm: float = 0.0,
    lr: float = 0.1,
    in_order: bool = False,
    around: Callable[[Worker], None] | None = None,
    prepare: Callable[[Any], None] | None = None,
    on_step: Callable[[Coordinator, StepRecord], None] | None = None,
) -> list[Run]:
    """Train on threads, coordinators and workers; what each has to say, by rank.

    Args:
        late: who never finishes which round; everybody else is in time, as far as the method waits for them.
        in_order: workers come one after the other in every round, and none that is not awaited.
        around: takes the place of a worker's loop.
        prepare: called with each coordinator and worker once it has started.
        on_step: called by the coordinators after each job.
    """
    options = CoordinationOptions(timeout_s=PATIENCE_S) if options is None else options
    script = Script(late)
    network = ThreadNetwork(num_workers + len(options.coordinators))

    def rank(comm: Any) -> Run:
        mine = network.at(comm.rank)
        if comm.rank in options.coordinators:
            nets = [Net(seed, dtype) for seed in range(models)]
            run = Run({})
            with Coordinator(
                nets,
                [sgd(net, lr) for net in nets],
                method,
                options,
                batch=batch,
                network=mine,
                max_grad_norm=max_grad_norm,
                clock=script,
            ) as coordinator:
                if coordinator.is_first:
                    script.coordinator = coordinator
                if prepare is not None:
                    prepare(coordinator)

                def note(record: StepRecord) -> None:
                    run.records.append(record)
                    if on_step is not None:
                        on_step(coordinator, record)

                coordinator.run(jobs, note)
            run.weights, run.rank = weights(nets[0]), coordinator
            return run
        net = Net(99, dtype)  # the coordinator's weights count
        with Worker(net, method, options, batch=batch, network=mine) as worker:
            if prepare is not None:
                prepare(worker)
            if around is not None:
                around(worker)
            else:
                work(worker, script, in_order)
        return Run(weights(net), rank=worker)

    return run_threads(rank, network.world_size)


def assert_close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], rtol: float = 1e-12) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=rtol)


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name

"""A small problem for coordinated training: float64, so that schemes can be told apart from rounding."""

from __future__ import annotations

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

BATCH = 48
FEATURES = 6


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
    rows = []
    for number in samples:
        generator = torch.Generator().manual_seed(number)
        rows.append(torch.randn(FEATURES, generator=generator, dtype=dtype))
    x = torch.stack(rows)
    return x, x.sum(1, keepdim=True).sin()


def loss_on(model: nn.Module, samples: range) -> Tensor:
    dtype = next(model.parameters()).dtype
    x, y = data(samples, dtype)
    return F.mse_loss(model(x), y)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


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


@dataclass
class Run:
    """What a rank has to say at the end."""

    weights: dict[str, Tensor]
    records: list[StepRecord] = field(default_factory=list)
    rank: Any = None  # the coordinator or worker


def work(worker: Worker, late: Late, pause: Callable[[], None] = lambda: None) -> None:
    """Compute; in rounds in which this worker is late, only wait for the next one."""
    me = worker.party.workers.index(worker.party.rank)

    def loss_of(share: Share) -> Tensor | None:
        if late(me, worker.round):
            while not share.superseded():
                pause()
                _breathe()
            return None
        return loss_on(worker.model, share.samples)

    worker.run(loss_of)


_pause = threading.Event()


def _breathe() -> None:
    _pause.wait(0.002)


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
    around: Callable[[Worker], None] | None = None,
    prepare: Callable[[Any], None] | None = None,
    on_step: Callable[[Coordinator, StepRecord], None] | None = None,
) -> list[Run]:
    """Train on threads, coordinators and workers; what each has to say, by rank.

    Args:
        around: takes the place of a worker's loop.
        prepare: called with each coordinator and worker once it has started.
        on_step: called by the coordinators after each job.
    """
    options = CoordinationOptions(timeout_s=30.0) if options is None else options
    network = ThreadNetwork(num_workers + len(options.coordinators))

    def rank(comm: Any) -> Run:
        mine = network.at(comm.rank)
        if comm.rank in options.coordinators:
            nets = [Net(seed, dtype) for seed in range(models)]
            run = Run({})
            with Coordinator(
                nets,
                [sgd(net) for net in nets],
                method,
                options,
                batch=batch,
                network=mine,
                max_grad_norm=max_grad_norm,
            ) as coordinator:
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
                work(worker, late)
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

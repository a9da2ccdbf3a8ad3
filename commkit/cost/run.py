"""Runs a scheme for a few steps or rounds over a given group: what its traffic, state and time are measured of."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..optim import OptimizerScheme
from ..outer import OuterScheme, OuterSync
from ..reducer import Reducer
from ..sharded import Segment, ShardedScheme, gather_into
from ..sim.mirror import Call, MirrorComm
from ..types import SHARED, Comm

STEPS = 2  # the second finds all state in place
GATHERS = 2  # of weights in a step of FSDP: for forward and for backward
# Settings under which the second step is one of the compressed stage.
MEASURED_WITH: Mapping[str, Mapping[str, Any]] = {
    "onebit_adam": {"freeze_step": 1},
    "onebit_lamb": {"freeze_step": 1},
    "zero_one_adam": {"var_freeze_step": 1},
    "a_edit": {"sync_seconds": 1e-9, "min_total_steps": 1},
    "monna": {"num_faulty": 0},  # two ranks cannot stand any
    "post_local_sgd": {"switch_step": 0},
    "single_merge": {"p_gossip": 1.0},  # a round in which there is a meeting
}


@dataclass(frozen=True)
class Ran:
    """The last step or round.

    Args:
        payload_bytes, wire_bytes: that this rank sent.
        rounds: its collectives.
        state_bytes: that it keeps between steps.
        seconds: that it took, collectives excluded.
        calls: these collectives, where ``comm`` writes them down.
        evaluations: of the closure that the optimizer's steps are given, in a step.
    """

    payload_bytes: int
    wire_bytes: int
    rounds: int
    state_bytes: int
    seconds: float
    calls: tuple[Call, ...]
    evaluations: float = 1.0


def run_steps(
    made: Reducer | OptimizerScheme,
    gradients: Mapping[str, Tensor],
    comm: Comm,
    steps: int = STEPS,
) -> Ran:
    """Reduce ``gradients``, by parameter name, and step an optimizer that communicates."""
    device = next(iter(gradients.values())).device
    weights = {name: nn.Parameter(torch.zeros_like(g)) for name, g in gradients.items()}
    optimizer = made(list(weights.values()), lr=1e-3) if isinstance(made, OptimizerScheme) else None
    reducer = optimizer.reducer if optimizer is not None else made
    assert isinstance(reducer, Reducer)
    if optimizer is not None:
        optimizer.bind(weights, comm)
        optimizer.set_up()
    for _ in range(steps):
        own = {name: g.clone() for name, g in gradients.items()}  # it is overwritten
        mark = _Mark(comm, device)
        reduced = reducer.reduce(own, comm)
        for name, x in reduced.items():
            weights[name].grad = x
        reducer.end_step()
        if optimizer is not None:
            optimizer.step()
        mark.stop()
    kept = [x for key, x in reducer.state_dict().items() if not key.startswith(f"{SHARED}/")]
    if optimizer is not None:
        for weight in weights.values():
            state = optimizer.state[weight].values()
            kept += [x for x in state if isinstance(x, Tensor) and x.ndim]
    return mark.ended(kept)


def run_rounds(
    made: OuterScheme,
    model: nn.Module,
    comm: Comm,
    look: Callable[[OuterSync], None] | None = None,
    rounds: int = STEPS,
) -> Ran:
    """Rounds of a method with local updates, around SGD on random gradients.

    Args:
        look: sees the method at work, before the first step.
        rounds: the last one is what is told.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(comm.rank)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)
    evaluated = 0

    def closure() -> float:
        nonlocal evaluated
        evaluated += 1
        return 0.0

    with made(model, optimizer, comm) as outer:
        if look is not None:
            look(outer)
        for _ in range(rounds):
            outer.state_dict()  # waits for what is in flight
            mark = _Mark(comm, next(model.parameters()).device)
            for _ in range(outer.sync_every):
                optimizer.step(closure)
        outer.state_dict()
        mark.stop()
        ran = mark.ended(list(outer.kept_tensors()))
        return replace(ran, evaluations=evaluated / (rounds * outer.sync_every))


def run_sharded(
    made: ShardedScheme, side: int, gathers: int, comm: Comm, device: torch.device | None = None
) -> Ran:
    """One square parameter: its weights gathered so many times, its gradient scattered; what the scheme leaves to FSDP is
    left out. ``side`` is a multiple of the number of ranks."""
    segments = (Segment("weight", side, side, comm.world_size),)
    shapes = {"weight": torch.Size((side, side))}
    row = torch.randn(side * side // comm.world_size, device=device)
    out = row.new_empty(comm.world_size, row.numel())
    codec, exchange = made.gathering(shapes), made.scattering(shapes, comm)
    mark = _Mark(comm, row.device)
    if codec is not None:
        for _ in range(gathers):
            gather_into(out, row, segments, codec, comm, step=0)
    if exchange is not None:
        exchange.mean_into(row, torch.randn_like(out), segments, step=0)
    mark.stop()
    return mark.ended([])


class _Mark:
    """Where a step begins."""

    def __init__(self, comm: Comm, device: torch.device) -> None:
        settle(device)
        self._comm, self._device = comm, device
        self._before = comm.bytes.copy()
        self._calls: list[Call] = comm.calls if isinstance(comm, MirrorComm) else []
        self._first = len(self._calls)
        self._after = self._before
        self._start = self._end = time.perf_counter()

    def stop(self) -> None:
        """It ends here."""
        settle(self._device)
        self._after, self._end = self._comm.bytes.copy(), time.perf_counter()

    def ended(self, kept: list[Tensor]) -> Ran:
        """Up to where it stopped; ``kept`` is the state."""
        now, then = self._after, self._before
        return Ran(
            now.payload_bytes - then.payload_bytes,
            now.wire_bytes - then.wire_bytes,
            now.rounds - then.rounds,
            sum(x.numel() * x.element_size() for x in kept),
            self._end - self._start - (now.seconds - then.seconds),
            tuple(self._calls[self._first :]),
        )


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of ``work``, its kernels on a GPU included."""
    settle(device)
    start = time.perf_counter()
    work()
    settle(device)
    return time.perf_counter() - start


def settle(device: torch.device) -> None:
    """Wait for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

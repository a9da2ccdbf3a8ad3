"""How long a scheme's own arithmetic takes: timed on this machine, per element of a gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..optim import OptimizerScheme
from ..outer import OuterScheme
from ..reducer import Reducer
from ..schemes import make_scheme
from ..sharded import ShardedScheme
from ..sim.mirror import MirrorComm, gradients_like
from .run import GATHERS, MEASURED_WITH, run_rounds, run_sharded, run_steps, timed

SIDE, MATRICES = 512, 8  # two million elements: past the caches, as gradients are
_WORLDS = (2, 8)
_REPEATS = 3
_STEPS = 8  # until memory that is given back is what is taken again: the second takes up to four times as long
_STEPS_OF_ROUND = 24
_ROUNDS = 5  # until memory is taken that was given back, too
TIMED = (Reducer, OptimizerScheme, OuterScheme, ShardedScheme)  # kinds of schemes that can be


@dataclass(frozen=True)
class Pace:
    """Seconds per element of one step or round; linear in the number of ranks, whose payloads are decoded.

    Args:
        alone: whatever the number of ranks; below 0 where time grows faster than they do.
        each: for each rank.
        step: for each step of a round of local updates, where a method does something in all of them.
    """

    alone: float
    each: float
    step: float = 0.0

    def seconds(self, numel: int, world_size: int, steps: int = 0) -> float:
        """Of a step, or of a round of so many."""
        return numel * max(self.alone + self.each * world_size + self.step * steps, 0.0)

    def __add__(self, other: Pace) -> Pace:
        """Of both, one after the other."""
        return Pace(self.alone + other.alone, self.each + other.each, self.step + other.step)

    def __mul__(self, times: float) -> Pace:
        """Where everything takes so many times as long."""
        return Pace(times * self.alone, times * self.each, times * self.step)


def pace_of(
    name: str,
    knobs: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
) -> Pace:
    """Timed now, with the threads that torch has; the best of a few.

    Args:
        name: a scheme for gradients; an optimizer that communicates, less the step of the one whose place it takes; a
            scheme for local updates, of which a round is timed less the steps; or one for sharded models.
        device: of the gradients; None is the CPU.
    """
    told = tuple(sorted((knobs or {}).items()))
    return _timed(name, told, str(device or "cpu"), torch.get_num_threads())


@lru_cache(maxsize=256)
def _timed(name: str, knobs: tuple[tuple[str, Any], ...], device: str, threads: int) -> Pace:
    numel = MATRICES * SIDE * SIDE
    given = {**MEASURED_WITH.get(name, {}), **dict(knobs)}
    low, high = (_best(name, given, device, w) for w in _WORLDS)
    each = max(high - low, 0.0) / (_WORLDS[1] - _WORLDS[0])
    alone, step = low - each * _WORLDS[0], 0.0
    if isinstance(make_scheme(name, given), OuterScheme):
        half = _STEPS_OF_ROUND // 2
        shorter = _best(name, given, device, _WORLDS[0], half)
        step = max(low - shorter, 0.0) / (_STEPS_OF_ROUND - half)
        alone -= step * _STEPS_OF_ROUND
    return Pace(alone / numel, each / numel, step / numel)


def _best(
    name: str,
    knobs: Mapping[str, Any],
    device: str,
    world_size: int,
    steps_of_round: int = _STEPS_OF_ROUND,
) -> float:
    made = make_scheme(name, knobs)
    if isinstance(made, ShardedScheme):
        return min(_sharded(made, device, world_size) for _ in range(_REPEATS))
    if isinstance(made, OuterScheme):
        return min(
            _round(name, knobs, device, world_size, steps_of_round) for _ in range(_REPEATS - 1)
        )
    shapes = {str(i): torch.Size((SIDE, SIDE)) for i in range(MATRICES)}
    gradients = {name: g.to(device) for name, g in gradients_like(shapes, seed=0).items()}
    seconds = min(
        run_steps(_gradient_scheme(name, knobs), gradients, MirrorComm(world_size), _STEPS).seconds
        for _ in range(_REPEATS)
    )
    if isinstance(made, OptimizerScheme):  # it takes the place of another one
        seconds = max(seconds - _plain_step(made.like, gradients), 0.0)
    return seconds


def _sharded(made: ShardedScheme, device: str, world_size: int) -> float:
    """Of a step: weights gathered twice, gradients scattered."""
    if made.between is not None:
        made = dataclasses.replace(made, local_size=1)
    comm = MirrorComm(world_size)
    side = SIDE * 2
    ran = run_sharded(made, side, GATHERS, comm, torch.device(device))
    return ran.seconds * MATRICES * SIDE**2 / side**2


def _plain_step(like: str, gradients: Mapping[str, torch.Tensor]) -> float:
    """Of torch's own optimizer."""
    weights = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients.values()]
    for weight, g in zip(weights, gradients.values(), strict=True):
        weight.grad = g
    optimizer = (
        torch.optim.SGD(weights, lr=1e-3, momentum=0.9)
        if like == "sgd"
        else torch.optim.AdamW(weights, lr=1e-3, fused=True)
    )
    optimizer.step()  # makes its state
    return min(timed(optimizer.step, weights[0].device) for _ in range(_REPEATS))


def _gradient_scheme(name: str, knobs: Mapping[str, Any]) -> Reducer | OptimizerScheme:
    made = make_scheme(name, knobs)
    assert isinstance(made, Reducer | OptimizerScheme)
    return made


def _round(name: str, knobs: Mapping[str, Any], device: str, world_size: int, number: int) -> float:
    """Of the own arithmetic of a round of so many steps: less the optimizer's."""
    layers = (torch.nn.Linear(SIDE, SIDE, bias=False, device=device) for _ in range(MATRICES))
    model = torch.nn.Sequential(*layers)
    made = make_scheme(name, {**knobs, "sync_every": number})
    assert isinstance(made, OuterScheme)
    ran = run_rounds(made, model, MirrorComm(world_size), rounds=_ROUNDS)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def steps() -> None:
        for _ in range(number):
            optimizer.step()

    return max(ran.seconds - timed(steps, torch.device(device)), 0.0)

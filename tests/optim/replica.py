"""One rank's parameters under an optimizer that communicates, with gradients given by hand."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from commkit.adapters.loss_scale import write_back
from commkit.metrics import StepStats
from commkit.optim import CommOptimizer
from commkit.sim import ThreadComm

Tensors = dict[str, torch.Tensor]
Make = Callable[[Any], CommOptimizer]

SHAPES: dict[str, tuple[int, ...]] = {
    "matrix": (24, 40),
    "conv": (8, 4, 3, 3),
    "bias": (40,),
    "scale": (),
    "empty": (0, 4),
}


def random(key: object, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def gradients(rank: int, step: int, dtype: torch.dtype = torch.float64) -> Tensors:
    """A part that all ranks share, and noise."""
    return {
        name: random((name, step), shape, dtype) + random((name, step, rank), shape, dtype)
        for name, shape in SHAPES.items()
    }


def parameters(dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(random(name, shape, dtype)) for name, shape in SHAPES.items()}


class Replica:
    def __init__(self, make: Make, comm: ThreadComm, dtype: torch.dtype = torch.float64) -> None:
        self.parameters = parameters(dtype)
        self.optimizer = make(list(self.parameters.values()))
        self.comm = comm
        self.optimizer.bind(self.parameters, comm)

    @property
    def reducer(self) -> Any:
        return self.optimizer.reducer

    def reduce(self, grads: Mapping[str, torch.Tensor]) -> StepStats:
        """What backward does."""
        for name, p in self.parameters.items():
            p.grad = grads[name].clone()
        named = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        write_back(self.reducer.reduce(dict(named), self.comm), named, 1.0)
        stats: StepStats = self.reducer.end_step()
        return stats

    def step(self, grads: Mapping[str, torch.Tensor]) -> StepStats:
        stats = self.reduce(grads)
        self.optimizer.step()
        return stats

    def values(self) -> Tensors:
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def state(self) -> Tensors:
        """Residuals and the like, without the step."""
        state = {key: x.clone() for key, x in self.reducer.state_dict().items()}
        del state["shared/step"]
        return state

    def message(self, name: str) -> torch.Tensor:
        """What arrived of a parameter in the last step."""
        grad = self.parameters[name].grad
        assert grad is not None
        return grad.clone()


def bits(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {key: x.clone() for key, x in tensors.items()}


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

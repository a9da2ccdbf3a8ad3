"""Drives an optimizer that communicates without any wrapper: named gradients in, parameters out."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from commkit.optim import CommOptimizer
from commkit.sim import ThreadComm, run_threads

SHAPES: dict[str, tuple[int, ...]] = {
    "matrix": (24, 16),
    "conv": (4, 3, 3, 3),
    "odd": (37,),
    "scalar": (),
}
Make = Callable[[list[nn.Parameter]], CommOptimizer]
Gradients = Callable[[int, int, str, Tensor], Tensor]


def noisy(rank: int, step: int, name: str, x: Tensor) -> Tensor:
    """Gradient of |x - 1|^2 / 2 with noise of each rank's own."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{rank}/{step}/{name}".encode()))
    return x - 1 + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)


@dataclass
class Replica:
    """One rank's model, without a model."""

    comm: ThreadComm
    optimizer: CommOptimizer
    parameters: dict[str, nn.Parameter]
    sent: list[dict[str, Tensor]] = field(default_factory=list)
    arrived: list[dict[str, Tensor]] = field(default_factory=list)

    def reduce(self, gradients: Mapping[str, Tensor]) -> None:
        """Backward: leave what arrives in ``p.grad``."""
        for name, p in self.parameters.items():
            p.grad = gradients[name].clone()
        named = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        results = self.optimizer.reducer.reduce(named, self.comm)
        for name, result in results.items():
            if result.data_ptr() != named[name].data_ptr():
                named[name].copy_(result)
        self.optimizer.reducer.end_step()

    def step(self, number: int, gradients: Gradients = noisy) -> None:
        with torch.no_grad():
            self.reduce(
                {
                    name: gradients(self.comm.rank, number, name, p.detach())
                    for name, p in self.parameters.items()
                }
            )
        self.optimizer.step()

    def flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.parameters.values()])


def parameters(
    shapes: Mapping[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32
) -> dict[str, nn.Parameter]:
    made = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        made[name] = nn.Parameter(x.to(dtype))
    return made


def replica(
    make: Make,
    comm: ThreadComm,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float32,
) -> Replica:
    made = parameters(shapes, dtype)
    optimizer = make(list(made.values()))
    optimizer.bind(made, comm)
    optimizer.set_up()
    return Replica(comm, optimizer, made)


def run(
    make: Make,
    world_size: int,
    steps: int,
    gradients: Gradients = noisy,
    body: Callable[[Replica, int], Any] | None = None,
    **options: Any,
) -> list[Replica]:
    """Train; ``body(replica, step)`` runs after each step."""

    def rank(comm: ThreadComm) -> Replica:
        mine = replica(make, comm, **options)
        for number in range(steps):
            mine.step(number, gradients)
            if body is not None:
                body(mine, number)
        return mine

    return run_threads(rank, world_size)


def same_bits(replicas: list[Replica]) -> bool:
    return all(torch.equal(replicas[0].flat(), other.flat()) for other in replicas[1:])

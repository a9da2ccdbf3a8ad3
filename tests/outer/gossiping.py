"""What tests of the methods without a collective share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from commkit.outer import OuterSync
from commkit.types import Comm

SIZE = 12  # elements of a Point


class Point(nn.Module):
    """One vector and a scalar: 12 parameters."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        values = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
        self.x = nn.Parameter(values[:-1].clone())
        self.y = nn.Parameter(values[-1].clone())

    @property
    def vector(self) -> Tensor:
        return torch.cat([self.x.detach(), self.y.detach().view(1)])

    @vector.setter
    def vector(self, value: Tensor) -> None:
        with torch.no_grad():
            self.x.copy_(value[:-1])
            self.y.copy_(value[-1])


Event = Callable[[int, int, Point], None]


def drift(rank: int, step: int, model: Point) -> None:
    """A gradient that depends on the rank and on where the model is."""
    target = torch.linspace(-1, 1, SIZE) * (rank + 1) + 0.1 * step
    gradient = model.vector - target
    model.x.grad, model.y.grad = gradient[:-1].clone(), gradient[-1].clone()


def still(rank: int, step: int, model: Point) -> None:
    model.x.grad, model.y.grad = torch.zeros_like(model.x), torch.zeros_like(model.y)


def walk(
    comm: Comm,
    method: Callable[..., OuterSync],
    steps: int,
    *,
    gradient: Event = drift,
    start: Callable[[int], Tensor] | None = None,
    lr: float = 0.1,
    each: Callable[[int, Point, OuterSync], None] | None = None,
    after: Callable[[Point, OuterSync], Any] | None = None,
) -> Any:
    """``steps`` inner steps. ``start(rank)`` replaces the equal start, ``each`` sees every step's end; returns what
    ``after`` says before the end."""
    model = Point(comm.rank)
    inner = torch.optim.SGD(model.parameters(), lr=lr)
    with method(model, inner, process_group=comm) as outer:
        if start is not None:
            model.vector = start(comm.rank)
            if outer.anchored:
                outer.anchors.read()
        for step in range(steps):
            gradient(comm.rank, step, model)
            inner.step()
            if each is not None:
                each(step, model, outer)
        result = after(model, outer) if after is not None else None
    return model.vector if after is None else result


def spread(vectors: list[Tensor]) -> float:
    """Mean squared distance from the mean."""
    x = torch.stack(vectors).double()
    return float((x - x.mean(0)).square().sum(1).mean())


def exchanges_only(outer: OuterSync) -> dict[str, int]:
    """The worker's bytes by kind of operation since the start, whose collectives are broadcasts."""
    counted = dict(outer._private_comm.bytes.by_op)
    return {op: n for op, n in counted.items() if not op.endswith("broadcast")}

"""A small problem that replicas train on, each with its own data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from commkit.outer import OuterSync
from commkit.types import Comm


class Net(nn.Module):
    """Two layers, a norm with buffers, a tied weight and a frozen one."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(5, 6)
        self.norm = nn.BatchNorm1d(6)
        self.second = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.second.weight
        self.frozen = nn.Parameter(torch.full((6,), 0.5), requires_grad=False)
        with torch.no_grad():
            for p in self.parameters():
                if p.requires_grad:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(x)))
        return self.tied(torch.tanh(self.second(hidden))) * self.frozen


def batch(rank: int, step: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(rows, 5, generator=generator)
    return x, torch.sin(x @ torch.linspace(-1, 1, 30).view(5, 6)) + 0.1 * rank


def inner_step(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    x, y = batch(rank, step)
    dtype = next(model.parameters()).dtype
    optimizer.zero_grad()
    F.mse_loss(model(x.to(dtype)), y.to(dtype)).backward()
    optimizer.step()


def train(
    comm: Comm,
    method: Callable[..., OuterSync],
    steps: int,
    *,
    model: nn.Module | None = None,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    before_step: Callable[[int, nn.Module], None] | None = None,
) -> tuple[nn.Module, OuterSync]:
    """``steps`` inner steps of ``method(model, optimizer, process_group=comm)``, data by rank."""
    model = Net(comm.rank) if model is None else model
    inner = (
        torch.optim.SGD(model.parameters(), lr=0.1)
        if optimizer is None
        else optimizer(model.parameters())
    )
    with method(model, inner, process_group=comm) as outer:
        for step in range(steps):
            if before_step is not None:
                before_step(step, model)
            inner_step(model, inner, comm.rank, step)
    return model, outer


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert torch.equal(x, b[name]), name

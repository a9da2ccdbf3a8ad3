"""A task with an accuracy, for faulty ranks to spoil."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CLASSES, _FEATURES = 4, 10


def centres() -> Tensor:
    return torch.randn(_CLASSES, _FEATURES, generator=torch.Generator().manual_seed(77)) * 1.2


def draw(seed: int, rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(_CLASSES, (rows,), generator=generator)
    return centres()[y] + torch.randn(rows, _FEATURES, generator=generator), y


def model() -> nn.Module:
    net = nn.Sequential(nn.Linear(_FEATURES, 16), nn.Tanh(), nn.Linear(16, _CLASSES))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return net


def gradient(net: nn.Module, rank: int, step: int) -> None:
    x, y = draw(100_000 * (rank + 1) + step, 16)
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    x, y = draw(5, 1000)
    return float((net(x).argmax(1) == y).float().mean())

"""A model of several layers, and data for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH = 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Deep(nn.Module):
    """A stem, three blocks and a head. ``skip`` leaves a block out; ``checkpointing`` computes blocks twice."""

    def __init__(self, seed: int, checkpointing: bool | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.stem = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 4)
        self.skip: int | None = None
        self.reentrant = checkpointing
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) * self.scale
        for index, block in enumerate(self.blocks):
            if index == self.skip:
                continue
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)  # type: ignore[no-untyped-call]
        return self.head(self.norm(x))


LAYERS = [
    ["scale", "stem.weight", "stem.bias"],
    *(
        [f"blocks.{i}.{part}.{kind}" for part in ("up", "down") for kind in ("weight", "bias")]
        for i in range(3)
    ),
    ["norm.weight", "norm.bias", "head.weight", "head.bias"],
]


def batch(rank: int, step: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(rows, 5, generator=generator)
    return x, torch.sin(x @ torch.linspace(-1, 1, 20).view(5, 4))


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    x, y = batch(rank, step)
    return F.mse_loss(model(x), y)


def inner_step(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> float:
    optimizer.zero_grad()
    loss = loss_of(model, rank, step)
    loss.backward()
    optimizer.step()
    return loss.item()

"""A small regression problem that every DDP test trains on, its data fixed by rank and step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

WIDTH = 64


def model(seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 8)
    )
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / max(p.shape[-1], 1) ** 0.5)
    return net


def batch(step: int, rank: int, rows: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(rows, WIDTH, generator=generator)
    target = torch.randn(WIDTH, 8, generator=torch.Generator().manual_seed(7)) / 8
    return x, x @ target


def loss_of(net: nn.Module, step: int, rank: int) -> Tensor:
    dtype = next(net.parameters()).dtype
    x, y = (t.to(dtype) for t in batch(step, rank))
    return nn.functional.mse_loss(net(x), y)


def train(
    net: DistributedDataParallel,
    steps: range,
    rank: int,
    before_step: Callable[[int], None] = lambda step: None,
    lr: float = 0.05,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[float]:
    """By plain SGD with momentum unless told otherwise; the losses on this rank."""
    if optimizer is None:
        optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9)
    losses = []
    for step in steps:
        before_step(step)
        loss = loss_of(net, step, rank)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def parameters(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def replicas_equal(net: nn.Module, group: dist.ProcessGroup | None = None) -> bool:
    """Whether all ranks of the group hold the same bits."""
    mine = parameters(net)
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(others, mine, group=group)
    return all(torch.equal(mine, other) for other in others)

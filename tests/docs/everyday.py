"""Names that mean the same on every page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import commkit

WIDTH = 64


class Net(nn.Module):
    """Some layers; calling it gives the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x.square().mean()


def everyday() -> dict[str, Callable[[], Any]]:
    """Makers of what each name means, by name; the same model in all of them."""
    net = Net()
    return {
        "model": lambda: net,
        "ddp_model": lambda: DistributedDataParallel(net),
        "optimizer": lambda: torch.optim.SGD(net.parameters(), lr=0.01),
        "loader": lambda: [torch.ones(2, WIDTH) for _ in range(2)],
        "log": lambda: lambda *_: None,
        "rank": dist.get_rank,
        "nodes": dist.get_world_size,
        "ranks_per_node": lambda: 1,
        "device_type": lambda: "cpu",
        "commkit": lambda: commkit,
        "torch": lambda: torch,
        "fully_shard": lambda: fully_shard,
        "init_device_mesh": lambda: init_device_mesh,
    }

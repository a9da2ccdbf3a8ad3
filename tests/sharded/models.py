"""A small sharded model, with everything that makes layouts hard."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width + 1)  # no multiple of the ranks
        self.down = nn.Linear(3 * width + 1, width)
        self.gate = nn.Parameter(torch.ones(width))
        self.spare = nn.Linear(width, width)  # only used if asked for

    def forward(self, x: Tensor, spare: bool = False) -> Tensor:
        y = self.down(torch.relu(self.up(self.norm(x)))) * self.gate
        return x + y + (self.spare(x) if spare else 0)


class Net(nn.Module):
    """``frozen`` is not trained; ``few`` has fewer rows than there are ranks."""

    def __init__(self, width: int = 32, blocks: int = 2) -> None:
        super().__init__()
        self.enter = nn.Linear(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.frozen = nn.Linear(width, width)
        self.few = nn.Linear(width, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor, spare: bool = False) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x, spare)
        return self.few(self.frozen(x))


def make(seed: int = 0, **sizes: int) -> Net:
    torch.manual_seed(seed)
    return Net(**sizes)


def shard(model: Net, mesh: DeviceMesh, **options: object) -> Net:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def line(world_size: int) -> DeviceMesh:
    return init_device_mesh("cpu", (world_size,), mesh_dim_names=("shard",))


def grid(replicas: int, shards: int) -> DeviceMesh:
    return init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(8, 16, generator=generator)
    return x, x[:, :3] * 2 - 1


def loss_of(model: nn.Module, step: int, rank: int, **options: bool) -> Tensor:
    x, y = batch(step, rank)
    return (model(x, **options) - y).square().mean()


def whole(x: Tensor) -> Tensor:
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by name; collective."""
    return {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}

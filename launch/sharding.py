"""Recipes for sharded models: ``fully_shard`` over a mesh, as the scheme and the settings want it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from commkit.schemes import make_scheme
from commkit.sharded import PartitionScheme, ShardedScheme
from launch.baselines import is_baseline
from launch.settings import TrainSettings
from launch.world import World


def is_sharded(settings: TrainSettings) -> bool:
    """Whether the recipe's model is sharded: its scheme is for such, or ``fsdp.shards`` asks for it."""
    if is_baseline(settings.scheme):
        return False
    made = make_scheme(settings.scheme)
    return isinstance(made, ShardedScheme | PartitionScheme) or settings.fsdp.shards > 0


def shard(
    model: nn.Module, settings: TrainSettings, world: World, device: torch.device
) -> DeviceMesh | None:
    """Shard the layers of ``model`` and what is left, in place; returns the mesh, if it has more axes than that.

    Raises:
        ValueError: ranks that do not make equal replicas.
    """
    made = make_scheme(settings.scheme)
    if isinstance(made, PartitionScheme):
        mesh = _tiers(settings, world, device)
        wrap(model, mesh["shard"], settings)
        return mesh
    alone = isinstance(made, ShardedScheme) and made.reducer is None
    shards = settings.fsdp.shards or (world.size if alone else world.local_size)
    _require_divisor(shards, world.size)
    if alone and shards != world.size:
        raise ValueError(
            f"fsdp.shards={shards} makes {world.size // shards} replicas, and {settings.scheme['name']!r} reduces nothing "
            "between them; use {name: hsdp, scheme: ..., inside: ...}, or leave fsdp.shards out"
        )
    names = ("replicate", "shard")
    mesh = init_device_mesh(device.type, (world.size // shards, shards), mesh_dim_names=names)
    wrap(model, mesh["shard"], settings)
    return None if alone else mesh


def wrap(model: nn.Module, mesh: DeviceMesh, settings: TrainSettings) -> None:
    """``fully_shard`` on each block and on the model."""
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": settings.fsdp.reshard_after_forward,
    }
    if settings.precision == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for layer in getattr(model, "blocks", ()):
        fully_shard(layer, **options)
    fully_shard(model, **options)


def _tiers(settings: TrainSettings, world: World, device: torch.device) -> DeviceMesh:
    """Nodes, ranks of a node, and those of them that share weights: two, unless ``fsdp.shards`` says otherwise."""
    shards = settings.fsdp.shards or (2 if world.local_size % 2 == 0 else 1)
    _require_divisor(shards, world.local_size)
    shape = (world.size // world.local_size, world.local_size // shards, shards)
    return init_device_mesh(device.type, shape, mesh_dim_names=("node", "local", "shard"))


def _require_divisor(shards: int, ranks: int) -> None:
    if ranks % shards:
        raise ValueError(
            f"fsdp.shards={shards} must divide the {ranks} ranks into equal parts; choose a divisor"
        )


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Backward passes of a sharded model inside keep their gradients; of any other, nothing changes."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(True)

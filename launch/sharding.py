"""Recipes for sharded models: ``fully_shard`` over a mesh, as the scheme and the settings want it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from commkit.schemes import make_scheme
from commkit.sharded import ShardedScheme
from launch.baselines import is_baseline
from launch.settings import TrainSettings
from launch.world import World


def scheme_of(settings: TrainSettings) -> ShardedScheme | None:
    """The recipe's scheme, if it is for sharded models."""
    if is_baseline(settings.scheme):
        return None
    made = make_scheme(settings.scheme)
    return made if isinstance(made, ShardedScheme) else None


def shard(
    model: nn.Module,
    scheme: ShardedScheme,
    settings: TrainSettings,
    world: World,
    device: torch.device,
) -> DeviceMesh | None:
    """Shard the layers of ``model`` and what is left, in place; returns the mesh, if it has an axis of replicas.

    Raises:
        ValueError: ranks that do not make equal replicas.
    """
    shards = settings.fsdp.shards or (
        world.local_size if scheme.reducer is not None else world.size
    )
    if world.size % shards:
        raise ValueError(
            f"fsdp.shards={shards} must divide the {world.size} ranks into equal replicas; choose a divisor"
        )
    if scheme.reducer is None and shards != world.size:
        raise ValueError(
            f"fsdp.shards={shards} makes {world.size // shards} replicas, and {settings.scheme['name']!r} reduces nothing "
            "between them; use {name: hsdp, scheme: ..., inside: ...}, or leave fsdp.shards out"
        )
    names = ("replicate", "shard")
    mesh = init_device_mesh(device.type, (world.size // shards, shards), mesh_dim_names=names)
    options: dict[str, Any] = {
        "mesh": mesh["shard"],
        "reshard_after_forward": settings.fsdp.reshard_after_forward,
    }
    if settings.precision == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for layer in getattr(model, "blocks", ()):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return mesh if scheme.reducer is not None else None


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

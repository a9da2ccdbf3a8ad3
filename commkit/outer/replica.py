"""The live model of one rank: what the inner optimizer trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..runtime.agreement import trainable_parameters
from ..runtime.replica_check import digest
from ..runtime.shards import local
from ..types import Comm


class Replica:
    """Weights and buffers by name, each once however often it is shared.

    Args:
        model: a module, or one in a DistributedDataParallel of this replica's own ranks.
        optimizer: the inner one.
        master_weights: full-precision copies by parameter name, where the inner optimizer keeps such: it
            is they that are read and written, and the parameters follow.

    Attributes:
        shard_group: the ranks that hold this replica together, where FSDP2 shards it; None where each rank
            has a whole one. Each rank then reads and writes its shards, and synchronises them with the
            ranks that hold the same shards of other replicas.

    Raises:
        ValueError: nothing to train, sparse gradients, several devices, master weights of an unknown
            name or another shape, or parameters sharded over several meshes or a mesh that spans replicas.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        master_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.optimizer = optimizer
        self.parameters = trainable_parameters(self.model)
        self.buffers = dict(self.model.named_buffers())
        self.shard_group = _shard_group(self.parameters)
        self._masters = dict(master_weights or {})
        for name, master in self._masters.items():
            if name not in self.parameters or master.shape != local(self.parameters[name]).shape:
                raise ValueError(
                    f"master_weights[{name!r}] of shape {tuple(master.shape)} fits no trainable parameter; give "
                    "one of each parameter's own name and shape"
                )

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal on all ranks. Frozen weights are never sent, so they are compared."""
        frozen = {n: p for n, p in self.model.named_parameters() if not p.requires_grad}
        return {
            "parameters": {n: f"{tuple(p.shape)} {p.dtype}" for n, p in self.parameters.items()},
            "buffers": {n: f"{tuple(b.shape)} {b.dtype}" for n, b in self.buffers.items()},
            "frozen parameters": {n: digest(p) for n, p in frozen.items()},
        }

    def follow(self, comm: Comm, src: int) -> None:
        """Take rank ``src``'s weights and buffers. Collective."""
        for name in self.parameters:
            self.live(name).copy_(_broadcast(self.live(name), comm, src))
            self._show(name)
        for buffer in self.buffers.values():
            buffer.copy_(_broadcast(buffer, comm, src))

    def live(self, name: str) -> Tensor:
        """The tensor that the inner optimizer trains, or this rank's shard of it."""
        return local(self._trained(name).detach())

    def _trained(self, name: str) -> Tensor:
        return self._masters.get(name, self.parameters[name])

    def write(self, name: str, value: Tensor, keep: float = 0.0) -> None:
        """``live <- keep * live + (1 - keep) * value``, rounded once."""
        live = self.live(name)
        value = value.to(live.device, non_blocking=True)
        if keep:
            value = value.lerp(live.to(value.dtype), keep)
        live.copy_(value)
        self._show(name)

    def show_masters(self) -> None:
        """Let the parameters follow masters that were changed in place."""
        for name in self._masters:
            self._show(name)

    def _show(self, name: str) -> None:
        if name in self._masters:
            local(self.parameters[name].detach()).copy_(self._masters[name])

    def reset_inner_state(self, names: Sequence[str] | None = None) -> None:
        """Start the inner optimizer's moments anew, all or those of parameters ``names``: they have seen what the
        weights must forget."""
        if names is None:
            self.optimizer.state.clear()
        else:
            for name in names:
                self.optimizer.state.pop(self._trained(name), None)

    def inner_state(self, names: Sequence[str]) -> list[Tensor]:
        """The inner optimizer's floating-point state of parameters ``names``: moments, not counters."""
        states = (self.optimizer.state.get(self._trained(name), {}) for name in names)
        return [
            local(value)
            for state in states
            for _, value in sorted(state.items())
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim()
        ]


def _shard_group(parameters: Mapping[str, Tensor]) -> dist.ProcessGroup | None:
    meshes = {p.device_mesh if isinstance(p, DTensor) else None for p in parameters.values()}
    if meshes == {None}:
        return None
    if len(meshes) > 1:
        raise ValueError(
            "some parameters are sharded and others not, or over different meshes; give one call of fully_shard "
            "on the root module all of them, on one mesh"
        )
    (mesh,) = meshes
    assert mesh is not None
    if mesh.ndim > 1:
        raise ValueError(
            f"parameters are on a mesh of {mesh.ndim} dimensions, over all of which FSDP averages gradients at "
            'every step; give fully_shard the shard axis alone (mesh["shard"]) and process_group='
            'mesh["replicate"].get_group()'
        )
    return mesh.get_group()


def _broadcast(x: Tensor, comm: Comm, src: int) -> Tensor:
    return comm.broadcast(x.detach().clone(memory_format=torch.contiguous_format), src)

"""An optimizer whose state is cut over a mesh, as an attachment."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from ..comm import DistComm
from ..metrics import StepStats
from ..runtime.agreement import agree, mark_attached, refuse_attached
from ..sharded import PartitionedOptimizer, PartitionState
from .kept import KeepsState


class PartitionHandle(KeepsState[PartitionState]):
    """An attachment to a :class:`~commkit.sharded.PartitionedOptimizer`, which does all by itself: what it measured, and how
    to save it.

    Attributes:
        reducer: what the ranks keep of their pieces, for :mod:`commkit.checkpoint`.
        comm: collectives over all ranks of the mesh, for the training thread.
    """

    def __init__(self, optimizer: PartitionedOptimizer) -> None:
        self._optimizer = optimizer
        self.reducer = PartitionState(optimizer)
        group = dist.new_group(
            optimizer.mesh.mesh.flatten().tolist(), use_local_synchronization=True
        )
        assert isinstance(group, dist.ProcessGroup)
        self.comm = DistComm(group)

    @property
    def last_step(self) -> StepStats:
        """Of the optimizer's last step."""
        return self._optimizer.last_step

    def close(self) -> None:
        """Nothing to stop."""


def attach_partition(model: nn.Module, optimizer: PartitionedOptimizer) -> PartitionHandle:
    """See :func:`commkit.attach`."""
    handle = PartitionHandle(optimizer)
    error: Exception | None = None
    try:
        refuse_attached(model)
        optimizer.require_parameters_of(model)
    except Exception as caught:
        error = caught
    agree(handle.comm, optimizer.fingerprint(), error)
    mark_attached(model)
    return handle

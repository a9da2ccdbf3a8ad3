"""What can be checked while training, at a price."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..outer import OuterSync
from ..runtime.replica_check import ReplicaCheck
from .at_step import StepHandle
from .ddp import Handle


@dataclass(frozen=True, slots=True)
class Debug:
    """
    Args:
        check_replicas_every: steps of the optimizer between two comparisons of all ranks' parameters (for local updates:
            of their anchors), bit for bit, see :func:`commkit.check_replicas`; 0 is never. Each reads all parameters once.
        wire_checksums: send a checksum with every payload, and raise on all ranks if one does not fit; the sender is named.
            About one more small collective for each.

    Raises:
        ValueError: a negative number of steps.
    """

    check_replicas_every: int = 0
    wire_checksums: bool = False

    def __post_init__(self) -> None:
        if self.check_replicas_every < 0:
            raise ValueError(
                f"check_replicas_every={self.check_replicas_every} must be >= 0; use 0 for never, or for example 100"
            )

    def refuse_sharded(self, model: nn.Module) -> None:
        """
        Raises:
            TypeError: a model with which this is not done.
        """
        if self != Debug() and isinstance(model, FSDPModule | FullyShardedDataParallel):
            raise TypeError(
                f"{self} is for replicas, and {type(model).__name__} is sharded; leave debug out, or train with "
                "DistributedDataParallel"
            )

    def watch(self, optimizer: object) -> ReplicaCheck | None:
        """The check that this asks for, before each step of ``optimizer`` from when it follows an attachment.

        Raises:
            TypeError: there is no optimizer.
        """
        if not self.check_replicas_every:
            return None
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"check_replicas_every={self.check_replicas_every} counts the optimizer's steps; write attach(model, "
                "scheme, optimizer, debug=...)"
            )
        check = ReplicaCheck(self.check_replicas_every)
        # Before attach registers its own: then nothing of the step is done yet.
        optimizer.register_step_pre_hook(check.before_step)
        return check


def follow(check: ReplicaCheck, model: nn.Module, handle: object) -> None:
    """Have ``check`` compare what is equal on all ranks of ``handle``.

    Raises:
        TypeError: there is nothing of the kind.
    """
    if isinstance(handle, OuterSync):
        if not (handle.anchored and handle.common_anchors):
            raise TypeError(
                f"check_replicas_every: {type(handle).__name__}'s ranks share no weights; leave it at 0"
            )
        check.follow(lambda: handle.anchors.values, lambda: handle.comm, lambda: handle.step)
        return
    assert isinstance(handle, Handle | StepHandle)

    inner = model.module if isinstance(model, DistributedDataParallel) else model

    def parameters() -> Mapping[str, Tensor]:
        return dict(inner.named_parameters())

    check.follow(parameters, lambda: handle.comm, lambda: handle.reducer.step)

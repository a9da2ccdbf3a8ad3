"""``attach`` as frameworks need it: they have an optimizer, which may be what communicates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ...optim import CommOptimizer
from ...outer import OuterScheme, OuterSync
from ...schemes import Scheme, make_scheme
from ...sharded import PartitionedOptimizer
from ..at_step import StepHandle
from ..attach import attach
from ..ddp import Handle
from ..fsdp1 import FSDP1Handle
from ..fsdp2 import ShardedHandle
from ..loss_scale import GradScaler
from ..partition import PartitionHandle

Attachment: TypeAlias = (
    "Handle | StepHandle | ShardedHandle | FSDP1Handle | PartitionHandle | OuterSync"
)


def connect(
    model: nn.Module,
    scheme: Scheme | OuterScheme | None,
    optimizer: Optimizer | None,
    *,
    remedy: str,
    knobs: dict[str, Any] | None = None,
    mesh: DeviceMesh | None = None,
    grad_scaler: GradScaler | None = None,
    timeout_s: float = 1800.0,
) -> Attachment:
    """Attach ``scheme``, or, if there is none, an ``optimizer`` that communicates. Collective.

    The framework saves the optimizer once for all ranks, so what of it is a rank's own is left to
    :func:`.contents_of` from now on.

    Args:
        model: as the framework has wrapped it.
        scheme: as for :func:`commkit.attach`; None if the optimizer is the scheme.
        optimizer: the one that the framework steps, itself and not the framework's wrapper of it.
        remedy: how this framework is told to leave the model alone, for a scheme with local updates.
        knobs: fields of the scheme.
        mesh: as for :func:`commkit.attach`.
        grad_scaler: as for :func:`commkit.attach`; a disabled one is left out.
        timeout_s: as for :func:`commkit.attach`.

    Raises:
        TypeError: two schemes, none, or one that the framework's wrapping cannot serve.
        RuntimeError: a DDP that spans the replicas of a scheme with local updates.
        Exception: whatever :func:`commkit.attach` raises.
    """
    check_one_scheme(scheme, optimizer)
    if isinstance(made_of(scheme, knobs), OuterScheme):
        _check_local(model, grad_scaler, remedy)
        grad_scaler = None
    handle = attach(
        model,
        optimizer if scheme is None else scheme,  # type: ignore[arg-type]
        None if scheme is None else optimizer,
        mesh=mesh,
        grad_scaler=grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None,
        timeout_s=timeout_s,
        **(knobs or {}),
    )
    if isinstance(optimizer, CommOptimizer):
        optimizer.residuals_apart = True
    return handle


def check_one_scheme(scheme: object, optimizer: Optimizer | None) -> None:
    """
    Raises:
        TypeError: neither ``scheme`` nor the optimizer communicates, or both do.
    """
    communicates = isinstance(optimizer, CommOptimizer | PartitionedOptimizer)
    if scheme is None and not communicates:
        raise TypeError(
            f"there is no scheme, and {type(optimizer).__name__} does not communicate; give a scheme, such as 'int8', "
            "or train with an optimizer of commkit.optim"
        )
    if scheme is not None and communicates:
        raise TypeError(
            f"scheme {scheme!r} and the optimizer {type(optimizer).__name__} would both reduce the gradients; leave the "
            "scheme out, or train with an optimizer of torch.optim"
        )


def made_of(scheme: object, knobs: dict[str, Any] | None = None) -> object:
    """What ``scheme`` builds, or itself if it is built already."""
    if not isinstance(scheme, str | Path | Mapping):
        return scheme
    return make_scheme(scheme, knobs)


def _check_local(model: nn.Module, grad_scaler: GradScaler | None, remedy: str) -> None:
    if isinstance(model, DistributedDataParallel):
        if model.process_group.size() > 1:
            raise RuntimeError(
                f"a DistributedDataParallel over {model.process_group.size()} ranks averages the gradients of replicas that "
                f"are to train alone; {remedy}"
            )
    elif any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise TypeError(
            "schemes with local updates around a sharded model are saved by commkit.checkpoint alone; use commkit.attach "
            "in a loop of your own, with commkit.ShardedReplicas"
        )
    if grad_scaler is not None and grad_scaler.is_enabled():
        raise TypeError(
            "a GradScaler skips steps on one rank, and schemes with local updates count them; train in bf16"
        )

"""What to save of an attachment, besides what the framework saves itself."""

from __future__ import annotations

from typing import Any, TypedDict

from torch.optim import Optimizer

from ...checkpoint import SchemeState
from ...comm import DistComm
from ...outer import OuterSync
from ...types import Stateful
from .connect import Attachment


class Contents(TypedDict):
    """The arguments of :func:`commkit.checkpoint.save` and ``load``."""

    replicated: dict[str, Stateful]
    per_rank: dict[str, Stateful]
    reducer: SchemeState
    comm: DistComm


def contents_of(handle: Attachment, optimizer: Optimizer | None) -> Contents:
    """Frameworks save model and optimizer of rank 0, since they take ranks to be equal. Residuals never are, and
    inside a round of local updates nothing is: then each rank saves its own weights and inner optimizer too."""
    replicated: dict[str, Any] = {}
    per_rank: dict[str, Any] = {}
    if isinstance(handle, OuterSync):
        replicated["method"] = handle
        per_rank["model"] = handle.replica.model
        per_rank["optimizer"] = optimizer
        per_rank["replica"] = handle.replica_state
    reducer: Any = handle.reducer
    comm: Any = handle.comm
    return Contents(replicated=replicated, per_rank=per_rank, reducer=reducer, comm=comm)

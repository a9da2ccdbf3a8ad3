"""Where training begins: from the same weights everywhere."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..runtime.shards import local
from ..types import Comm


@torch.no_grad()
def follow_first(parameters: Iterable[Tensor], comm: Comm) -> None:
    """As DDP does: all take the first rank's weights, or its shards of them; frozen ones too."""
    for p in parameters:
        weights = local(p.detach())
        weights.copy_(comm.broadcast(weights.contiguous(), src=0))

"""2-norms of pseudo-gradients, of which a rank may have a shard."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..types import Comm


def squared_norm(xs: Iterable[Tensor], device: torch.device) -> Tensor:
    """0-d float64 on ``device``: the squared 2-norm of all ``xs`` together."""
    norms = [torch.linalg.vector_norm(x).double() for x in xs if x.numel()]
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(norms).square().sum() if norms else zero


def over_shards(squares: Tensor, shards: Comm | None) -> Tensor:
    """Squared norms of the whole from those of this rank's shard; ``shards`` joins the ranks of one replica, None where
    this rank has all of it. Collective over it."""
    return squares if shards is None else shards.all_reduce(squares)

"""Norms of whole gradients, and by how much to shrink them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .ops import two_norm
from .types import Comm


def mean_norm(named: Mapping[str, Tensor], comm: Comm | None, shards: Comm | None = None) -> float:
    """2-norm of all tensors together, the same bits in whatever order they come; over ``comm``, the root of
    the mean of the ranks' squares: at least the norm of the ranks' mean, and equal on all. Where the tensors are
    shards, ``shards`` are the ranks that hold the others, and the norm is of the whole."""
    norms = [
        two_norm(x.to(torch.promote_types(x.dtype, torch.float32)))
        for _, x in sorted(named.items())
        if x.numel()
    ]
    if not norms and shards is None:
        return 0.0
    if not norms:  # a rank whose shards are all empty still has to take part
        norms = [x.new_zeros(()) for x in named.values()][:1] or [torch.zeros(())]
    total = torch.linalg.vector_norm(torch.stack([norm.double() for norm in norms]))
    if comm is None and shards is None:
        return float(total)
    square = total.square().view(1)
    if comm is not None:
        square = comm.all_reduce(square / comm.world_size)
    if shards is not None:
        square = shards.all_reduce(square)
    return math.sqrt(float(square)) if bool(square.isfinite()) else math.inf


def require_norm(name: str, value: float) -> None:
    """Refuse a largest norm below 0, which no gradient could keep.

    Raises:
        ValueError: ``value`` is negative or NaN.
    """
    if not value >= 0:
        raise ValueError(f"{name}={value} must be >= 0; use 0 for no clipping")


def clip_coefficient(norm: float, max_norm: float) -> float:
    """min(1, max_norm / norm); 1 if the norm is not finite, which is somebody else's to deal with."""
    return min(1.0, max_norm / norm) if math.isfinite(norm) and norm > 0 else 1.0

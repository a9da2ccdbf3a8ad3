"""A random subset whose indices every rank knows, so that only values travel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..registry import register
from ..types import Compressor, Payload, TensorCtx, Wire


@register("compressor", "randomk")
@dataclass(frozen=True, slots=True)
class RandomK(Compressor):
    """``k = max(1, ceil(density * n))`` elements, one drawn uniformly from each of k consecutive strata:
    without replacement, anew every step, from shared randomness.

    The payload is linear, so an all-reduce carries it at any number of ranks.

    Args:
        density: share of elements sent, in (0, 1].
        unbiased: multiply values by their stratum's size (n/k), which makes the code unbiased with a
            variance of (n/k - 1) |x|^2; for use without feedback. Error feedback refuses it.

    Raises:
        ValueError: density outside (0, 1].
    """

    wire: ClassVar[Wire] = "summable"
    density: float = 0.01
    unbiased: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density} must be in (0, 1]; use for example 0.01")

    @property
    def allows_error_feedback(self) -> bool:
        return not self.unbiased

    def k(self, numel: int) -> int:
        """How many elements of a tensor of ``numel`` are sent."""
        return min(numel, max(1, math.ceil(self.density * numel)))

    def compress(self, x: Tensor, ctx: TensorCtx, salt: int = 0) -> Payload:
        return (x.reshape(-1).index_select(0, self._indices(ctx)).to(ctx.work_dtype),)

    def decompress(self, payload: Payload, ctx: TensorCtx) -> Tensor:
        out = torch.zeros(ctx.numel, dtype=ctx.work_dtype, device=ctx.device)
        values = payload[0]
        if self.unbiased:
            k = values.numel()
            bounds = torch.arange(k + 1, device=ctx.device) * ctx.numel // max(k, 1)
            values = values * bounds.diff()
        return out.index_copy_(0, self._indices(ctx), values).view(ctx.shape)

    def payload_bytes(self, ctx: TensorCtx) -> int:
        return self.k(ctx.numel) * ctx.work_dtype.itemsize

    def _indices(self, ctx: TensorCtx) -> Tensor:
        k = self.k(ctx.numel)
        return ops.stratified_indices(ctx.numel, k, ctx.shared_seed(), ctx.device)

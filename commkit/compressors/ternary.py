"""Stochastic ternary codes, 2 bits per element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..registry import register
from ..types import Payload, TensorCtx
from .scaled_codes import ScaledCodes, add_up_blocks


@register("compressor", "ternary")
@dataclass(frozen=True, slots=True)
class Ternary(ScaledCodes):
    """``s * sgn(x) * Bernoulli(|x|/s)`` with ``s = max|x|`` after clipping (Wen et al. 2017, eq. 1 and 10).

    Unbiased up to the clipping, so no feedback is needed, and none may be used: the code is not a
    contraction, and error feedback on it diverges.

    Args:
        clip: values are clamped to this many root mean squares first (the paper's c = 2.5), which keeps
            one outlier from setting the noise of all; 0 turns clipping off and makes the code unbiased.

    Raises:
        ValueError: a negative clip.
    """

    clip: float = 2.5

    def __post_init__(self) -> None:
        if not self.clip >= 0:
            raise ValueError(f"clip={self.clip} must be >= 0; use 2.5, or 0 for no clipping")

    @property
    def allows_error_feedback(self) -> bool:
        return False

    def compress(self, x: Tensor, ctx: TensorCtx, salt: int = 0) -> Payload:
        flat = clipped(x.reshape(-1).to(ctx.work_dtype), self.clip)
        size = largest(flat)
        codes = ops.ternarize(flat, size, ctx.shared_seed(salt))
        return ops.pack_ternary(codes), size.view(1)

    def add_up(
        self,
        out: Tensor,
        codes: Sequence[Tensor],
        scales: Sequence[Tensor],
        divisor: int,
        accumulate: bool,
    ) -> None:
        if out.numel():  # as one block
            add_up_blocks(out, codes, scales, 2, out.numel(), divisor, accumulate)

    def payload_bytes(self, ctx: TensorCtx) -> int:
        return -(-ctx.numel // 4) + 4


def clipped(flat: Tensor, clip: float) -> Tensor:
    """``flat`` clamped to ``clip`` root mean squares; itself where ``clip`` is 0."""
    if clip == 0 or flat.numel() == 0:
        return flat
    limit = ops.two_norm(flat) * (clip / flat.numel() ** 0.5)
    return flat.clamp(-limit, limit)


def largest(flat: Tensor) -> Tensor:
    """0-d float32 ``max|flat|``, 0 of nothing."""
    if flat.numel() == 0:
        return flat.new_zeros((), dtype=torch.float32)
    low, high = torch.aminmax(flat)
    return torch.maximum(high, -low).to(torch.float32)

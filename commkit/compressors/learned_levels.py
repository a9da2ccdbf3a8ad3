"""Codes whose levels are fitted to the values that they stand for: QSDP's learned levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .. import ops
from ..registry import register
from ..types import Compressor, Payload, TensorCtx
from .unsigned import buckets, check_buckets, check_size, pack_unsigned, unpack_unsigned


@register("compressor", "learned_levels")
@dataclass(frozen=True, slots=True)
class LearnedLevels(Compressor):
    """Each bucket is scaled to [0, 1] by its smallest and largest element, and what is in between goes to one of 2^bits
    levels that are put where the tensor's values are (Markov et al. 2023, section 5). The levels travel with the
    codes, so that ranks need not agree on them: 4 bytes each, and 8 bytes for each bucket.

    Differences from the paper: it adapts levels by gradient steps a few times in a run; here each message fits its own by
    Lloyd's iteration, of which those steps are the stochastic form, on a sample of its values. The outermost levels stay at 0
    and 1.

    Args:
        bits: 2, 4 or 8 per element. It pays at 4 and 2; at 8 uniform levels are as good.
        bucket_size: elements per range, a multiple of 4.
        rounding: "nearest", or "stochastic": unbiased, between the two levels around a value.
        samples: how many values the levels are fitted to, evenly spread over the tensor.
        iterations: of Lloyd's; 0 leaves the levels uniform.

    Raises:
        ValueError: a value out of range.
    """

    shows_nonfinite: ClassVar[bool] = True

    bits: Literal[2, 4, 8] = 4
    bucket_size: int = 1024
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    samples: int = 4096
    iterations: int = 10

    def __post_init__(self) -> None:
        check_buckets(self.bits, self.bucket_size)
        if self.rounding not in ("stochastic", "nearest"):
            raise ValueError(f"rounding={self.rounding!r} must be 'stochastic' or 'nearest'")
        if self.samples < 1 << self.bits:
            raise ValueError(
                f"samples={self.samples} must be at least the {1 << self.bits} levels; use for example 4096"
            )
        if self.iterations < 0:
            raise ValueError(f"iterations={self.iterations} must be >= 0; use for example 10")

    @property
    def allows_error_feedback(self) -> bool:
        return self.rounding == "nearest" and self.bits > 2

    def compress(self, x: Tensor, ctx: TensorCtx, salt: int = 0) -> Payload:
        rows = buckets(x.reshape(-1).to(ctx.work_dtype).float(), self.bucket_size)
        levels = torch.linspace(0, 1, 1 << self.bits, device=x.device)
        if rows.numel() == 0:
            return (
                torch.zeros(0, dtype=torch.uint8, device=x.device),
                rows.new_empty((0, 2)),
                levels,
            )
        lo, hi = torch.aminmax(rows, dim=1, keepdim=True)
        width = hi / 2 - lo / 2  # halves: the difference itself may overflow
        v = (rows / 2 - lo / 2).div_(width).masked_fill_(width == 0, 0.0)
        v = v.view(-1)[: ctx.numel].clamp_(0, 1).nan_to_num_(0.0)
        levels = self._fit(levels, v)
        below = torch.searchsorted(levels, v, right=True).sub_(1).clamp_(0, levels.numel() - 2)
        left, right = levels[below], levels[below + 1]
        share = (v - left).div_(right - left).nan_to_num_(0.0)
        if self.rounding == "stochastic":
            up = share > ops.uniform_noise(v.numel(), ctx.shared_seed(salt), ctx.device)
        else:
            up = share > 0.5
        codes = (below + up).to(torch.uint8)
        return pack_unsigned(codes, self.bits), torch.cat([lo, width], dim=1), levels

    def decompress(self, payload: Payload, ctx: TensorCtx) -> Tensor:
        codes, ranges, levels = payload
        check_size("ranges", ranges, -(-ctx.numel // self.bucket_size), 2)
        check_size("levels", levels, 1 << self.bits)
        values = levels[unpack_unsigned(codes, ctx.numel, self.bits).long()]
        rows = buckets(values, self.bucket_size)
        whole = torch.addcmul(ranges[:, :1], rows, ranges[:, 1:], value=2.0)
        return whole.view(-1)[: ctx.numel].to(ctx.work_dtype).view(ctx.shape)

    def payload_bytes(self, ctx: TensorCtx) -> int:
        n = ctx.numel
        return -(-n * self.bits // 8) + 8 * -(-n // self.bucket_size) + (4 << self.bits)

    def _fit(self, levels: Tensor, v: Tensor) -> Tensor:
        """Levels between which the sampled values of ``v`` lie near, ascending."""
        sample = v[:: max(1, v.numel() // self.samples)]
        for _ in range(self.iterations):
            nearest = torch.bucketize(sample, (levels[1:] + levels[:-1]) / 2)
            count = torch.bincount(nearest, minlength=levels.numel())
            total = torch.zeros_like(levels).index_add_(0, nearest, sample)
            levels = torch.where(count > 0, total / count.clamp(min=1), levels)
            levels[0], levels[-1] = 0.0, 1.0
        return levels

"""QSGD: stochastic rounding to a few levels of a bucket's norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .. import ops
from ..registry import register
from ..types import Payload, TensorCtx
from .scaled_codes import ScaledCodes, add_up_blocks


@register("compressor", "qsgd")
@dataclass(frozen=True, slots=True)
class QSGD(ScaledCodes):
    """``norm * sgn(x) * l / s`` where l is ``s |x| / norm`` rounded up or down at random, bucket by bucket
    (Alistarh et al. 2017, section 3.1). Unbiased: no feedback is needed.

    Codes are of fixed width in place of the paper's Elias code: bits/8 bytes per element and 4 per bucket.

    Args:
        bits: 2, 4 or 8 per element. 2 is for many ranks, whose noise averages out; 8 is nearly lossless.
        bucket_size: elements per norm, a multiple of 4. Smaller buckets are less noisy and cost
            4/bucket_size bytes per element: 512 is 1.6 % at 4 bits.
        norm: "l2" is the paper's, whose noise :attr:`variance_bound` limits; "max" is less noisy on dense
            buckets (at 4 and 8 bits it is block_quantize with stochastic rounding).
        levels: s, at most ``2^(bits-1) - 1``, which None stands for. Fewer levels are noisier and save
            nothing at a fixed width: for comparison with other codes.

    Raises:
        ValueError: bits, norm, bucket size or levels out of range.
    """

    bits: Literal[2, 4, 8] = 4
    bucket_size: int = 512
    norm: Literal["l2", "max"] = "l2"
    levels: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise ValueError(f"bits={self.bits} must be 2, 4 or 8; use one of them")
        if self.bucket_size < 4 or self.bucket_size % 4:
            raise ValueError(
                f"bucket_size={self.bucket_size} must be a multiple of 4; use for example 512"
            )
        if self.norm not in ("l2", "max"):
            raise ValueError(f"norm={self.norm!r} must be 'l2' or 'max'; use one of them")
        if self.levels is not None and not 1 <= self.levels <= self._most_levels:
            raise ValueError(
                f"levels={self.levels} must be in [1, {self._most_levels}] at bits={self.bits}; use None "
                "for the most, or more bits"
            )

    @property
    def s(self) -> int:
        """Levels above zero."""
        return self._most_levels if self.levels is None else self.levels

    @property
    def variance_bound(self) -> float:
        """omega in ``E |C(x) - x|^2 <= omega |x|^2``: ``min(d/s^2, sqrt(d)/s)`` for the 2-norm (lemma 3.1).
        For "max" it is ``(sqrt(1 + (d-1)/s^2) - 1) / 2``, what one element at the norm and d - 1 equal ones
        between zero and the first level come to at worst."""
        d, s = self.bucket_size, self.s
        if self.norm == "l2":
            return min(d / s**2, math.sqrt(d) / s)
        return (math.sqrt(1 + (d - 1) / s**2) - 1) / 2

    @property
    def allows_error_feedback(self) -> bool:
        return self.variance_bound < 1

    def compress(self, x: Tensor, ctx: TensorCtx, salt: int = 0) -> Payload:
        codes, scales = ops.quantize_buckets(
            x.reshape(-1), self.s, self.bucket_size, self.norm == "l2", ctx.shared_seed(salt)
        )
        return ops.pack_codes(codes, self.bits), scales

    def add_up(
        self,
        out: Tensor,
        codes: Sequence[Tensor],
        scales: Sequence[Tensor],
        divisor: int,
        accumulate: bool,
    ) -> None:
        add_up_blocks(out, codes, scales, self.bits, self.bucket_size, divisor, accumulate)

    def payload_bytes(self, ctx: TensorCtx) -> int:
        return -(-ctx.numel * self.bits // 8) + 4 * -(-ctx.numel // self.bucket_size)

    @property
    def _most_levels(self) -> int:
        return (1 << (self.bits - 1)) - 1

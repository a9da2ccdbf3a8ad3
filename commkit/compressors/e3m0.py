"""Four bits per element that are a sign and an exponent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from .. import ops
from ..registry import register
from ..types import Payload, TensorCtx
from .scaled_codes import ScaledCodes

_LEVELS = 64  # from the smallest magnitude to the scale


@register("compressor", "e3m0")
@dataclass(frozen=True, slots=True)
class E3M0(ScaledCodes):
    """E3M0 floats: ``+-S 2^-k`` for k = 0 to 6, or 0, with the largest magnitude S of each block as a float32
    (Streaming DiLoCo, Douillard et al. 2025). For what is heavy-tailed, as outer gradients are:
    beside 4-bit linear codes it has less than half the error on Student-t (3 degrees of freedom) data, and
    twice on Gaussian data (3.8 % of the energy against 1.6 %).

    Half a byte per element, two to a byte, and 4 bytes per block. Magnitudes from S/64 on are off by a third
    at most; below S/128 they are sent as 0.

    Args:
        block_size: elements per scale; even. It matters little here: 256 costs 1.6 % of an element's byte,
            4096 nothing.
        rounding: "nearest" in linear distance, a tie to the smaller magnitude; wants error feedback.
            "stochastic" between the two neighbours is unbiased and needs none.

    Raises:
        ValueError: a block size that is not an even number of at least 2, or another rounding.
    """

    shows_nonfinite: ClassVar[bool] = True

    block_size: int = 256
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self) -> None:
        if self.block_size < 2 or self.block_size % 2:
            raise ValueError(
                f"block_size={self.block_size} must be an even number >= 2; use for example 256"
            )
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(
                f"rounding={self.rounding!r} must be 'nearest' or 'stochastic'; use one of them"
            )

    @property
    def variance_bound(self) -> float:
        """omega in ``E |C(x) - x|^2 <= omega |x|^2`` of stochastic rounding: 1/8 between two levels, and what
        one element at S and all others half-way to the first level come to."""
        return max(1 / 8, (math.sqrt(1 + (self.block_size - 1) / _LEVELS**2) - 1) / 2)

    @property
    def allows_error_feedback(self) -> bool:
        return self.rounding == "nearest" or self.variance_bound < 1

    def compress(self, x: Tensor, ctx: TensorCtx, salt: int = 0) -> Payload:
        stochastic = self.rounding == "stochastic"
        seed = ctx.shared_seed(salt) if stochastic else 0
        return ops.quantize_e3m0(x.reshape(-1), self.block_size, stochastic, seed)

    def add_up(
        self,
        out: Tensor,
        codes: Sequence[Tensor],
        scales: Sequence[Tensor],
        divisor: int,
        accumulate: bool,
    ) -> None:
        add_up = ops.accumulate_e3m0_ if accumulate else ops.write_e3m0_
        add_up(out, codes, scales, self.block_size, divisor)

    def payload_bytes(self, ctx: TensorCtx) -> int:
        return -(-ctx.numel // 2) + 4 * -(-ctx.numel // self.block_size)

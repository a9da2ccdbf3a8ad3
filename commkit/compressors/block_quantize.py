"""Linear 8- or 4-bit codes with one scale per block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from .. import ops
from ..registry import register
from ..types import Payload, TensorCtx
from .scaled_codes import ScaledCodes, add_up_blocks


@register("compressor", "block_quantize")
@dataclass(frozen=True, slots=True)
class BlockQuantize(ScaledCodes):
    """Symmetric linear quantisation, one float32 scale per block (Dettmers 2016; Alistarh et al. 2017).

    Args:
        bits: 8 sends 1 byte per element, 4 half a byte, plus 4 bytes per block.
        block_size: elements per scale; even. Smaller blocks follow outliers better and cost 4/block_size
            bytes per element: 256 is 1.6 %.
        rounding: "stochastic" is unbiased and needs no feedback; "nearest" has half the error or less and
            wants error feedback.

    Raises:
        ValueError: bits other than 4 or 8, or a block size that is not an even number of at least 2.
    """

    shows_nonfinite: ClassVar[bool] = True

    bits: Literal[4, 8] = 8
    block_size: int = 256
    rounding: Literal["nearest", "stochastic"] = "stochastic"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits={self.bits} must be 4 or 8; use one of them")
        if self.block_size < 2 or self.block_size % 2:
            raise ValueError(
                f"block_size={self.block_size} must be an even number >= 2; use for example 256"
            )
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding={self.rounding!r} must be 'nearest' or 'stochastic'")

    def compress(self, x: Tensor, ctx: TensorCtx, salt: int = 0) -> Payload:
        stochastic = self.rounding == "stochastic"
        seed = ctx.shared_seed(salt) if stochastic else 0
        return ops.quantize_blocks(x.reshape(-1), self.bits, self.block_size, stochastic, seed)

    def add_up(
        self,
        out: Tensor,
        codes: Sequence[Tensor],
        scales: Sequence[Tensor],
        divisor: int,
        accumulate: bool,
    ) -> None:
        add_up_blocks(out, codes, scales, self.bits, self.block_size, divisor, accumulate)

    def payload_bytes(self, ctx: TensorCtx) -> int:
        n = ctx.numel
        return (n if self.bits == 8 else -(-n // 2)) + 4 * -(-n // self.block_size)

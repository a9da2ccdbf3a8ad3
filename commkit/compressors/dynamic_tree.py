"""Dynamic 8-bit codes: many levels near the largest magnitude, and a range of seven decades."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ..registry import register
from ..types import Compressor, Payload, TensorCtx


@functools.lru_cache(maxsize=8)
def dynamic_levels(device: torch.device) -> Tensor:
    """(256,) float32, increasing: 0, 1 and, for i = 0 to 6, plus and minus ``10^(i-6)`` times the midpoints
    of 2^i equal cells of [0.1, 1]. The smallest are +-5.5e-7, the most negative is -0.99297."""
    sizes = [
        10.0 ** (i - 6) * (0.1 + 0.9 * (cell + 0.5) / 2**i)
        for i in range(7)
        for cell in range(2**i)
    ]
    return torch.tensor(
        sorted([*sizes, *(-size for size in sizes), 0.0, 1.0]), dtype=torch.float32, device=device
    )


@register("compressor", "dynamic8")
@dataclass(frozen=True, slots=True)
class DynamicTree(Compressor):
    """The index of one of 256 levels, and one float32 scale per block (Dettmers 2016, dynamic tree, in the
    codebook form of later 8-bit optimizers).

    Beside linear codes it keeps elements far below a block's largest, at half the precision near it. The
    scale is the block's largest magnitude, or 1.007 times it where that element is negative, since the most
    negative level is -0.99297: so the extreme of a block is sent exactly, whatever its sign.

    Args:
        block_size: elements per scale. Smaller blocks follow outliers better and cost 4/block_size bytes
            per element: 256 is 1.6 %.
        rounding: "stochastic" rounds between neighbouring levels, is unbiased and needs no feedback;
            "nearest" has half the error or less and wants error feedback.

    Raises:
        ValueError: a block size below 1, or another rounding.
    """

    block_size: int = 256
    rounding: Literal["nearest", "stochastic"] = "stochastic"

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be >= 1; use for example 256")
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(
                f"rounding={self.rounding!r} must be 'nearest' or 'stochastic'; use one of them"
            )

    def compress(self, x: Tensor, ctx: TensorCtx, salt: int = 0) -> Payload:
        stochastic = self.rounding == "stochastic"
        seed = ctx.shared_seed(salt) if stochastic else 0
        levels = dynamic_levels(x.device)
        return ops.quantize_codebook(x.reshape(-1), levels, self.block_size, stochastic, seed)

    def decompress(self, payload: Payload, ctx: TensorCtx) -> Tensor:
        codes, scales = payload
        blocks = -(-ctx.numel // self.block_size)
        if scales.numel() != blocks:
            raise ValueError(f"a payload has {scales.numel()} scales for {blocks} blocks")
        x = ops.dequantize_codebook(codes, dynamic_levels(codes.device), scales, self.block_size)
        return x.to(ctx.work_dtype).view(ctx.shape)

    def payload_bytes(self, ctx: TensorCtx) -> int:
        return ctx.numel + 4 * -(-ctx.numel // self.block_size)

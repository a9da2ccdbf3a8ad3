"""Natural compression: nothing but signs and exponents."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import ops
from ..registry import register
from ..types import Compressor, Payload, TensorCtx


@register("compressor", "natural")
@dataclass(frozen=True, slots=True)
class Natural(Compressor):
    """Every element becomes one of the two powers of two around it, at random so that it is unbiased, with a
    variance of at most 1/8 of its square (Horvath et al. 2019, definition 2 and theorem 3).

    One byte per element, a sign and a 7-bit exponent, and 4 bytes of the largest power of two. 126 octaves
    below that, elements become zero or the smallest power, at random too. No feedback is needed, and there
    is nothing to tune: against 8-bit blocks it is noisier on a block's largest elements and finer on its
    small ones. A tensor that holds a magnitude above 2^127 (1.7e38) has no code and is sent densely.
    """

    def compress(self, x: Tensor, ctx: TensorCtx, salt: int = 0) -> Payload:
        return ops.quantize_natural(x.reshape(-1), ctx.shared_seed(salt))

    def decompress(self, payload: Payload, ctx: TensorCtx) -> Tensor:
        codes, top = payload
        return ops.dequantize_natural(codes, top, ctx.work_dtype).view(ctx.shape)

    def payload_bytes(self, ctx: TensorCtx) -> int:
        return ctx.numel + 4

"""No compression: the payload is the tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..registry import register
from ..types import Compressor, Payload, TensorCtx, Wire


@register("compressor", "none")
@dataclass(frozen=True, slots=True)
class NoCompression(Compressor):
    """The tensor itself, in its own dtype."""

    wire: ClassVar[Wire] = "summable"

    def compress(self, x: Tensor, ctx: TensorCtx, salt: int = 0) -> Payload:
        return (x.reshape(-1).to(ctx.work_dtype, copy=True),)

    def decompress(self, payload: Payload, ctx: TensorCtx) -> Tensor:
        return payload[0].to(ctx.work_dtype, copy=True).view(ctx.shape)

    def payload_bytes(self, ctx: TensorCtx) -> int:
        return ctx.numel * ctx.work_dtype.itemsize

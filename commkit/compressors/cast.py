"""Half-precision payloads: bfloat16 or float16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..registry import register
from ..types import Compressor, Payload, TensorCtx, Wire

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@register("compressor", "cast")
@dataclass(frozen=True, slots=True)
class Cast(Compressor):
    """Rounds to 16 bits: half the bytes, no state.

    Args:
        dtype: "bf16" keeps float32's range at 8 bits of precision; "fp16" has 11 bits but ends at 65504
            (a step that overflows is sent densely instead). An all-reduce adds up in this precision.

    Raises:
        ValueError: another dtype.
    """

    wire: ClassVar[Wire] = "summable"
    dtype: Literal["bf16", "fp16"] = "bf16"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be 'bf16' or 'fp16'; use one of them")

    def compress(self, x: Tensor, ctx: TensorCtx, salt: int = 0) -> Payload:
        return (x.reshape(-1).to(_DTYPES[self.dtype], copy=True),)

    def decompress(self, payload: Payload, ctx: TensorCtx) -> Tensor:
        return payload[0].to(ctx.work_dtype, copy=True).view(ctx.shape)

    def payload_bytes(self, ctx: TensorCtx) -> int:
        return 2 * ctx.numel

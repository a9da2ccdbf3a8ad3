"""One bit per element and one scale per tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ..registry import register
from ..types import Compressor, Payload, TensorCtx


@register("compressor", "sign")
@dataclass(frozen=True, slots=True)
class Sign(Compressor):
    """``scale * sgn(x)`` with sgn(0) = +1, 8 signs per byte (Seide et al. 2014; Tang et al. 2021).

    Biased: use error feedback.

    Args:
        scale: "l1" sends mean|x|, the scale of least squared error and always a contraction; "rms" sends
            the root mean square as 1-bit Adam's paper does, which keeps the norm but is no contraction on
            heavy-tailed tensors.

    Raises:
        ValueError: another scale.
    """

    scale: Literal["l1", "rms"] = "l1"

    def __post_init__(self) -> None:
        if self.scale not in ("l1", "rms"):
            raise ValueError(f"scale={self.scale!r} must be 'l1' or 'rms'; use one of them")

    def compress(self, x: Tensor, ctx: TensorCtx, salt: int = 0) -> Payload:
        flat = x.reshape(-1).to(ctx.work_dtype)
        n = max(flat.numel(), 1)
        if self.scale == "l1":
            size = torch.linalg.vector_norm(flat, 1) / n
        else:
            size = ops.two_norm(flat) / n**0.5
        return ops.pack_signs(flat), size.to(torch.float32).view(1)

    def decompress(self, payload: Payload, ctx: TensorCtx) -> Tensor:
        bits, size = payload
        signs = ops.unpack_signs(bits, ctx.numel, ctx.work_dtype)
        return signs.mul_(size).view(ctx.shape)

    def payload_bytes(self, ctx: TensorCtx) -> int:
        return -(-ctx.numel // 8) + 4

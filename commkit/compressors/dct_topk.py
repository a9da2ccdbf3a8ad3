"""The largest cosine coefficients of each tile."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .. import ops
from ..registry import register
from ..types import Compressor, Payload, TensorCtx

_VALUES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_INDEX = torch.int16
_LARGEST_CHUNK = math.isqrt(torch.iinfo(_INDEX).max)


@register("compressor", "dct_topk")
@dataclass(frozen=True, slots=True)
class DCTTopK(Compressor):
    """The ``top_k`` largest coefficients of an orthonormal DCT-II of each tile, as (int16 place in the tile,
    value) pairs (DeMo, Peng et al. 2024, section 3). Biased: use error feedback.

    A tensor is seen as a matrix, (shape[0], the rest), or one row if it has fewer than two dimensions; a tile
    is s1 x s2 of it, where s is the largest divisor of a side that is at most ``chunk``. A tensor for which
    that would not save anything (few elements per tile, as with prime sides) is sent as it is.

    Ranks pick different coefficients, so they are combined as the mean of the ranks that sent a coefficient
    (a zero is not sent), not of all ranks: what one rank alone found important arrives in full.

    Differences from the public code: 16-bit places in place of 64-bit ones, arithmetic in float32 whatever
    the tensor's dtype, coefficients combined in rank order, so that replicas hold the same bits, convolutions
    as matrices, and no message longer than the tensor.

    Args:
        top_k: coefficients of each tile; 32 of 4096 is a 64th in bytes at "bf16". 1 to 32 were studied.
        chunk: largest side of a tile. Larger finds smoother patterns; the transform costs s1 + s2
            multiplications per element.
        values: "bf16", "fp16" or "fp32" on the wire; feedback keeps the rounding error.

    Raises:
        ValueError: top_k < 1, chunk outside [2, 181] (places are 16 bits), or unknown values.
    """

    shows_nonfinite: ClassVar[bool] = (
        True  # in the first coefficient, which is among the largest then
    )

    top_k: int = 32
    chunk: int = 64
    values: Literal["fp32", "bf16", "fp16"] = "bf16"

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be >= 1; use for example 32")
        if not 2 <= self.chunk <= _LARGEST_CHUNK:
            raise ValueError(
                f"chunk={self.chunk} must be in [2, {_LARGEST_CHUNK}], as places in a tile are 16 bits; "
                "use for example 64"
            )
        if self.values not in _VALUES:
            raise ValueError(f"values={self.values!r} must be 'fp32', 'bf16' or 'fp16'")

    def shrinks(self, ctx: TensorCtx) -> bool:
        """Whether coefficients take fewer bytes than the tensor; if not, the tensor itself is sent."""
        return self._coefficient_bytes(ctx) < ctx.numel * ctx.dtype.itemsize

    def compress(self, x: Tensor, ctx: TensorCtx, salt: int = 0) -> Payload:
        if not self.shrinks(ctx):
            return (x.to(ctx.dtype, copy=True),)
        coefficients = self._transform(x.to(ctx.work_dtype))
        places = ops.largest_of_rows(coefficients, self._k(ctx))
        sent = coefficients.gather(1, places)
        return places.to(_INDEX), sent.to(_VALUES[self.values])

    def decompress(self, payload: Payload, ctx: TensorCtx) -> Tensor:
        return self.combine([payload], ctx)

    def combine(self, payloads: Sequence[Payload], ctx: TensorCtx) -> Tensor:
        out = ops.empty((ctx.numel,), ctx.work_dtype, ctx.device)
        self.combine_into(out, payloads, ctx)
        return out.view(ctx.shape)

    def combine_into(self, out: Tensor, payloads: Sequence[Payload], ctx: TensorCtx) -> None:
        if self.shrinks(ctx):
            self._combine(out, payloads, ctx, subtract=False)
        else:
            out.copy_(_mean([payload[0].view(-1).to(ctx.work_dtype) for payload in payloads]))

    def subtract_(self, x: Tensor, payload: Payload, ctx: TensorCtx) -> None:
        if self.shrinks(ctx):
            self._combine(x, [payload], ctx, subtract=True)
        else:
            x.sub_(payload[0].view(-1).to(ctx.work_dtype))

    def _combine(
        self, out: Tensor, payloads: Sequence[Payload], ctx: TensorCtx, subtract: bool
    ) -> None:
        _, height, columns, width = _tiling(ctx.shape, self.chunk)
        places, values = [p for p, _ in payloads], [v.to(ctx.work_dtype) for _, v in payloads]
        tall, wide = (dct_basis(side, ctx.work_dtype, ctx.device) for side in (height, width))
        ops.combine_tiles_(out, places, values, tall, wide, columns, subtract)

    def payload_bytes(self, ctx: TensorCtx) -> int:
        dense = ctx.numel * ctx.dtype.itemsize
        return self._coefficient_bytes(ctx) if self.shrinks(ctx) else dense

    def _coefficient_bytes(self, ctx: TensorCtx) -> int:
        rows, _, columns, _ = _tiling(ctx.shape, self.chunk)
        return rows * columns * self._k(ctx) * (_INDEX.itemsize + _VALUES[self.values].itemsize)

    def _k(self, ctx: TensorCtx) -> int:
        _, height, _, width = _tiling(ctx.shape, self.chunk)
        return min(self.top_k, height * width)

    def _transform(self, x: Tensor) -> Tensor:
        """Coefficients, (tiles, elements of a tile)."""
        rows, height, columns, width = _tiling(x.shape, self.chunk)
        x = x.reshape(rows, height, columns * width)
        x = dct_basis(height, x.dtype, x.device) @ x
        x = x.view(-1, width) @ dct_basis(width, x.dtype, x.device).T
        return x.view(rows, height, columns, width).transpose(1, 2).reshape(-1, height * width)


@functools.lru_cache(maxsize=64)
def dct_basis(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size, size) orthonormal DCT-II: row k is ``cos(pi (2 n + 1) k / (2 size))`` over n, of length 1."""
    n = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(torch.pi / (2 * size) * torch.outer(n, 2 * n + 1)) * math.sqrt(2 / size)
    basis[:1] /= math.sqrt(2)
    return basis.to(dtype).to(device)


@functools.lru_cache(maxsize=1024)
def _tiling(shape: torch.Size, chunk: int) -> tuple[int, int, int, int]:
    """(rows of tiles, height of a tile, columns of tiles, width of a tile); no tiles of an empty tensor."""
    if not shape.numel():
        return 0, 1, 0, 1
    height = shape[0] if len(shape) > 1 else 1
    tall, wide = (_largest_divisor(side, chunk) for side in (height, shape.numel() // height))
    return height // tall, tall, shape.numel() // height // wide, wide


def _largest_divisor(n: int, limit: int) -> int:
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)


def _mean(xs: Sequence[Tensor]) -> Tensor:
    total = xs[0] / len(xs)
    for x in xs[1:]:
        total += x / len(xs)
    return total

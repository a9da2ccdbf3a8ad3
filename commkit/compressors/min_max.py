"""Linear codes between the smallest and the largest element of a bucket: QSDP's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .. import ops
from ..registry import register
from ..types import Compressor, Payload, TensorCtx
from .unsigned import buckets, check_buckets, check_size, pack_unsigned, unpack_unsigned


@register("compressor", "min_max")
@dataclass(frozen=True, slots=True)
class MinMax(Compressor):
    """``lo + u j`` with ``u = (hi - lo) / (2^bits - 1)``, bucket by bucket (Markov et al. 2023, section 3).

    Unbiased but for "nearest". The payload is the codes and two float32 numbers for each bucket.

    Args:
        bits: 8 sends 1 byte per element, 4 half a byte, 2 a quarter.
        bucket_size: elements per range, a multiple of 4. Smaller buckets follow outliers better and cost
            8/bucket_size bytes per element: 1024 is 0.8 % at 8 bits.
        rounding: "shift" rounds to the nearest point of a lattice that is moved at random, once for each bucket:
            the paper's for weights. Its error is uniform, of variance u^2/12, half of what "stochastic" has, the
            paper's for gradients, whose errors are independent. "nearest" is biased.

    Raises:
        ValueError: bits, bucket size or rounding out of range.
    """

    shows_nonfinite: ClassVar[bool] = True

    bits: Literal[2, 4, 8] = 8
    bucket_size: int = 1024
    rounding: Literal["shift", "stochastic", "nearest"] = "stochastic"

    def __post_init__(self) -> None:
        check_buckets(self.bits, self.bucket_size)
        if self.rounding not in ("shift", "stochastic", "nearest"):
            raise ValueError(
                f"rounding={self.rounding!r} must be 'shift', 'stochastic' or 'nearest'"
            )

    @property
    def allows_error_feedback(self) -> bool:
        # An error may be as large as a step of the lattice. Beside an offset that all elements share, it is larger
        # than what the elements themselves say: a bucket of nearly equal ones is no contraction.
        return self.rounding == "nearest" and self.bits > 2

    def compress(self, x: Tensor, ctx: TensorCtx, salt: int = 0) -> Payload:
        rows = buckets(x.reshape(-1).to(ctx.work_dtype).float(), self.bucket_size)
        if rows.numel() == 0:
            return torch.zeros(0, dtype=torch.uint8, device=x.device), rows.new_empty((0, 2))
        lo, hi = torch.aminmax(rows, dim=1, keepdim=True)
        step = hi / self._top - lo / self._top  # each first: their difference may overflow
        if self.rounding == "shift":
            lo = lo + (self._noise(rows.shape[0], ctx, salt) - 0.5).unsqueeze(1) * step
        y = (rows - lo).div_(step)
        y.masked_fill_(step == 0, 0.0)
        if self.rounding == "stochastic":
            y.add_(self._noise(y.numel(), ctx, salt).view_as(y)).floor_()
        else:
            y.round_()
        codes = y.clamp_(0, self._top).nan_to_num_(0.0).to(torch.uint8).view(-1)[: ctx.numel]
        return pack_unsigned(codes, self.bits), torch.cat([lo, step], dim=1)

    def decompress(self, payload: Payload, ctx: TensorCtx) -> Tensor:
        codes, ranges = payload
        check_size("ranges", ranges, -(-ctx.numel // self.bucket_size), 2)
        rows = buckets(unpack_unsigned(codes, ctx.numel, self.bits).float(), self.bucket_size)
        values = torch.addcmul(ranges[:, :1], rows, ranges[:, 1:])
        return values.view(-1)[: ctx.numel].to(ctx.work_dtype).view(ctx.shape)

    def payload_bytes(self, ctx: TensorCtx) -> int:
        return -(-ctx.numel * self.bits // 8) + 8 * -(-ctx.numel // self.bucket_size)

    @property
    def _top(self) -> int:
        return (1 << self.bits) - 1

    def _noise(self, numel: int, ctx: TensorCtx, salt: int) -> Tensor:
        return ops.uniform_noise(numel, ctx.shared_seed(salt), ctx.device)

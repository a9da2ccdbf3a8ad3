"""One bit per element and nothing else: a vote on the direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..registry import register
from ..types import Compressor, Payload, TensorCtx


@register("compressor", "vote")
@dataclass(frozen=True, slots=True)
class SignVote(Compressor):
    """``sgn(x)``, 8 to a byte, without a scale (Bernstein et al. 2018, algorithm 3). Behind two_shot the
    second compression makes the majority vote of the mean of signs, and every result is +1 or -1.

    An exact zero, which is also the tie of an even number of votes, is decided by a coin: uniform noise
    keyed by ``ctx.shared_seed(salt)``, tossed once by the rank that compresses, so that all ranks hear the
    same side. Always +1 would make parameters drift.

    Magnitudes are lost on purpose: the learning rate is the step. Error feedback is refused, since nothing
    relates what is sent to the size of what is not; ``sign`` is the code for that.
    """

    @property
    def allows_error_feedback(self) -> bool:
        return False

    def compress(self, x: Tensor, ctx: TensorCtx, salt: int = 0) -> Payload:
        flat = x.reshape(-1)
        if flat.device.type == "cpu" and bool(flat.all()):  # nothing to toss for
            return (ops.pack_signs(flat),)
        coins = ops.uniform_noise(flat.numel(), ctx.shared_seed(salt), flat.device).sub_(0.5)
        return (ops.pack_signs(torch.where(flat == 0, coins.to(flat.dtype), flat)),)

    def decompress(self, payload: Payload, ctx: TensorCtx) -> Tensor:
        return self.combine([payload], ctx)

    def payload_bytes(self, ctx: TensorCtx) -> int:
        return -(-ctx.numel // 8)

    def combine(self, payloads: Sequence[Payload], ctx: TensorCtx) -> Tensor:
        out = ops.empty((ctx.numel,), ctx.work_dtype, ctx.device)
        self.combine_into(out, payloads, ctx)
        return out.view(ctx.shape)

    def combine_into(self, out: Tensor, payloads: Sequence[Payload], ctx: TensorCtx) -> None:
        """The mean of the signs. Added up before the division: whole numbers, whose ties are exactly zero."""
        ones = torch.ones(len(payloads), dtype=out.dtype, device=out.device)
        ops.write_signs_(out, [bits for (bits,) in payloads], ones)
        out.div_(len(payloads))

    def subtract_(self, x: Tensor, payload: Payload, ctx: TensorCtx) -> None:
        ops.accumulate_signs_(x, list(payload), -torch.ones(1, dtype=x.dtype, device=x.device))

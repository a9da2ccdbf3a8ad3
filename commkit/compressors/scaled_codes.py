"""What codes with scales share: payloads of ranks are added up straight from their bytes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from .. import ops
from ..types import Compressor, Payload, TensorCtx


class ScaledCodes(Compressor):
    """A compressor whose payload is (codes, float32 scales), and proportional to its scales."""

    @abstractmethod
    def add_up(
        self,
        out: Tensor,
        codes: Sequence[Tensor],
        scales: Sequence[Tensor],
        divisor: int,
        accumulate: bool,
    ) -> None:
        """Write to ``out``, or add to it, the sum of what the codes stand for, each over ``divisor``."""

    def decompress(self, payload: Payload, ctx: TensorCtx) -> Tensor:
        return self.combine([payload], ctx)

    def combine(self, payloads: Sequence[Payload], ctx: TensorCtx) -> Tensor:
        out = ops.empty((ctx.numel,), ctx.work_dtype, ctx.device)
        self.combine_into(out, payloads, ctx)
        return out.view(ctx.shape)

    def combine_into(self, out: Tensor, payloads: Sequence[Payload], ctx: TensorCtx) -> None:
        codes, scales = [codes for codes, _ in payloads], [scales for _, scales in payloads]
        self.add_up(out, codes, scales, len(payloads), accumulate=False)

    def subtract_(self, x: Tensor, payload: Payload, ctx: TensorCtx) -> None:
        codes, scales = payload
        self.add_up(x, [codes], [-scales], 1, accumulate=True)


def add_up_blocks(
    out: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: int,
    block_size: int,
    divisor: int,
    accumulate: bool,
) -> None:
    """:meth:`ScaledCodes.add_up` of linear codes."""
    add_up = ops.accumulate_blocks_ if accumulate else ops.write_blocks_
    add_up(out, codes, scales, bits, block_size, divisor)

"""One row of a flat buffer as a message: some segments compressed, the others as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..aggregators.message import Layout
from ..compressors import NoCompression
from ..metrics import profiler_range
from ..policy import Policy
from ..types import Compressor, Payload, TensorCtx
from .layout import Segment, padded, pieces

_DENSE = NoCompression()


@dataclass(slots=True)
class RowCodec:
    """Encodes rows of flat buffers whose layout is known.

    Args:
        compressor: of the segments that ``policy`` chooses.
        policy: by the whole parameter: ``min_numel`` is of all its chunks together.
        shapes: of the whole parameters, by key.
        seed: base of shared randomness.
    """

    compressor: Compressor
    policy: Policy
    shapes: dict[str, torch.Size]
    seed: int = 0
    _layouts: dict[object, Layout] = field(default_factory=dict, init=False, repr=False)

    def encode(
        self,
        row: Tensor,
        segments: Sequence[Segment],
        chunk: int,
        step: int,
        salt: int,
        flag: Tensor | None = None,
    ) -> Tensor:
        """uint8 message of a 1-D row that holds chunk ``chunk`` of each segment; filling is left out.

        ``salt`` tells apart messages of one step, so that they are rounded independently. A ``flag`` that is not finite
        can be asked for at the other end, see :meth:`told_nonfinite`.
        """
        xs = pieces(row, segments, chunk)
        ctxs = [self._ctx(s, x, step) for s, x in zip(segments, xs, strict=True)]
        chosen = [i for i, ctx in enumerate(ctxs) if self._compresses(segments[i], ctx)]
        payloads: list[Payload] = [(x,) for x in xs]
        with profiler_range("compress"):
            made = self.compressor.compress_each(
                [xs[i] for i in chosen], [ctxs[i] for i in chosen], salt
            )
        for i, payload in zip(chosen, made, strict=True):
            payloads[i] = payload
        return Layout(payloads).encode(payloads, row.new_zeros(()) if flag is None else flag)

    def size(self, row: Tensor, segments: Sequence[Segment], chunk: int, step: int) -> int:
        """Bytes of the message of a row like ``row``."""
        return self._layout(row, segments, chunk, step).size

    def told_nonfinite(
        self, message: Tensor, row: Tensor, segments: Sequence[Segment], chunk: int, step: int
    ) -> Tensor:
        """0-d, NaN if the message's flag was not finite, else 0; ``row`` as in :meth:`size`."""
        return self._layout(row, segments, chunk, step).flag(message)

    def decode_into(
        self,
        out: Tensor,
        messages: Sequence[Tensor],
        segments: Sequence[Segment],
        chunk: int,
        step: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write the mean of what ``messages`` say to ``out``, a row; filling becomes 0. ``dtype`` is that of the rows
        they were made of, if not ``out``'s."""
        if padded(segments) != sum(s.valid(chunk) for s in segments):
            out.zero_()
        outs = pieces(out, segments, chunk)
        row = out if dtype in (None, out.dtype) else out.to(dtype)
        xs = pieces(row, segments, chunk)
        ctxs = [self._ctx(s, x, step) for s, x in zip(segments, xs, strict=True)]
        layout = self._layout(row, segments, chunk, step)
        told = [layout.decode(message) for message in messages]
        with profiler_range("decompress"):
            for i, (x, ctx) in enumerate(zip(outs, ctxs, strict=True)):
                payloads = [each[i] for each in told]
                if not x.numel():
                    continue
                if not self._compresses(segments[i], ctx):
                    x.copy_(_DENSE.combine(payloads, ctx))
                elif x.dtype == ctx.work_dtype:
                    self.compressor.combine_into(x, payloads, ctx)
                else:
                    x.copy_(self.compressor.combine(payloads, ctx))

    def _layout(self, row: Tensor, segments: Sequence[Segment], chunk: int, step: int) -> Layout:
        """Of the message of such a row."""
        # By what is compressed, since that may change with the step.
        xs = pieces(row, segments, chunk)
        ctxs = [self._ctx(s, x, step) for s, x in zip(segments, xs, strict=True)]
        chosen = tuple(self._compresses(s, c) for s, c in zip(segments, ctxs, strict=True))
        asked = (tuple(segments), chunk, row.dtype, chosen)
        if asked not in self._layouts:
            self._layouts[asked] = Layout(
                [
                    _shells(self.compressor.compress(torch.zeros_like(x), ctx) if yes else (x,))
                    for x, ctx, yes in zip(xs, ctxs, chosen, strict=True)
                ]
            )
        return self._layouts[asked]

    def _ctx(self, segment: Segment, x: Tensor, step: int) -> TensorCtx:
        return TensorCtx(segment.key, x.shape, x.dtype, x.device, step, self.seed)

    def _compresses(self, segment: Segment, ctx: TensorCtx) -> bool:
        whole = TensorCtx(
            ctx.key, self.shapes[segment.key], ctx.dtype, ctx.device, ctx.step, ctx.seed
        )
        return ctx.numel > 0 and self.policy.compresses(whole)


def _shells(payload: Payload) -> Payload:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device="meta") for t in payload)

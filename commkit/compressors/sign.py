"""One bit per element and one scale per tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

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

    shows_nonfinite: ClassVar[bool] = True

    scale: Literal["l1", "rms"] = "l1"

    def __post_init__(self) -> None:
        if self.scale not in ("l1", "rms"):
            raise ValueError(f"scale={self.scale!r} must be 'l1' or 'rms'; use one of them")

    def compress(self, x: Tensor, ctx: TensorCtx, salt: int = 0) -> Payload:
        flat = x.reshape(-1)
        if self.scale == "l1":
            return ops.encode_signs(flat)
        return ops.pack_signs(flat), _rms(flat, ctx).view(1)

    def compress_each(
        self, xs: Sequence[Tensor], ctxs: Sequence[TensorCtx], salt: int = 0
    ) -> list[Payload]:
        # Of float64 there is no kernel, and among others it would take them to the reference's rounding.
        if len(xs) < 2 or any(x.dtype == torch.float64 for x in xs):
            return Compressor.compress_each(self, xs, ctxs, salt)
        flats = [x.reshape(-1) for x in xs]
        bits, sizes = _room(flats)
        ops.foreach_encode_signs_(bits, sizes, flats)
        return self._payloads(bits, sizes, flats, ctxs)

    def compress_sums(
        self,
        sums: Sequence[Tensor],
        residuals: Sequence[Tensor],
        sent: Sequence[Tensor | None],
        gradients: Sequence[Tensor],
        ctxs: Sequence[TensorCtx],
        salt: int = 0,
    ) -> list[Payload]:
        bits, sizes = _room(sums)
        ops.foreach_encode_signs_of_sums_(
            bits, sizes, sums, residuals, gradients, _joined_sent(sent)
        )
        return self._payloads(bits, sizes, sums, ctxs)

    def compress_means(
        self,
        sums: Sequence[Tensor],
        residuals: Sequence[Tensor],
        sent: Sequence[Tensor | None],
        received: Sequence[Sequence[Payload]],
        ctxs: Sequence[TensorCtx],
        salt: int = 0,
    ) -> list[Payload]:
        bits, sizes = _room(sums)
        ops.foreach_reencode_signs_(
            bits, sizes, sums, residuals, _joined_sent(sent), *_rows(received)
        )
        return self._payloads(bits, sizes, sums, ctxs)

    def nothing_sent(self, received: Sequence[Sequence[Payload]]) -> list[bool]:
        if not received:
            return []
        sizes = torch.cat([size for of_ranks in received for _, size in of_ranks])
        nothing: list[bool] = (sizes == 0).view(len(received), -1).all(1).tolist()
        return nothing

    def mean_sent(self, payload: Payload) -> Tensor | None:
        return payload[1] if self.scale == "l1" else None

    def _payloads(
        self, bits: Tensor, sizes: Tensor, flats: Sequence[Tensor], ctxs: Sequence[TensorCtx]
    ) -> list[Payload]:
        """Those of each, of the signs of all and their mean magnitudes."""
        if self.scale == "rms":
            sizes = torch.stack([_rms(x, ctx) for x, ctx in zip(flats, ctxs, strict=True)])
        parts = bits.split_with_sizes([_bytes(x) for x in flats])
        return list(zip(parts, sizes.split_with_sizes([1] * len(flats)), strict=True))

    def decompress(self, payload: Payload, ctx: TensorCtx) -> Tensor:
        return self.combine([payload], ctx)

    def combine(self, payloads: Sequence[Payload], ctx: TensorCtx) -> Tensor:
        out = ops.empty((ctx.numel,), ctx.work_dtype, ctx.device)
        self.combine_into(out, payloads, ctx)
        return out.view(ctx.shape)

    def combine_into(self, out: Tensor, payloads: Sequence[Payload], ctx: TensorCtx) -> None:
        sizes = torch.cat([size for _, size in payloads]).to(out.dtype) / len(payloads)
        ops.write_signs_(out, [bits for bits, _ in payloads], sizes)

    def combine_each_into(
        self,
        outs: Sequence[Tensor],
        payloads: Sequence[Sequence[Payload]],
        ctxs: Sequence[TensorCtx],
    ) -> None:
        if not _together(outs):
            Compressor.combine_each_into(self, outs, payloads, ctxs)
            return
        ops.foreach_write_signs_(outs, *_rows(payloads))

    def subtract_each_(
        self, xs: Sequence[Tensor], payloads: Sequence[Payload], ctxs: Sequence[TensorCtx]
    ) -> None:
        if not _together(xs):
            Compressor.subtract_each_(self, xs, payloads, ctxs)
            return
        bits, sizes = _joined(payloads)
        ops.foreach_accumulate_signs_(xs, [bits], -sizes.unsqueeze(0))

    def subtract_(self, x: Tensor, payload: Payload, ctx: TensorCtx) -> None:
        bits, size = payload
        ops.accumulate_signs_(x, [bits], -size.to(x.dtype))

    def payload_bytes(self, ctx: TensorCtx) -> int:
        return -(-ctx.numel // 8) + 4


def _bytes(x: Tensor) -> int:
    """Of its signs."""
    return -(-x.numel() // 8)


def _room(xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """For the signs of all, and a scale of each."""
    device = xs[0].device
    bits = torch.empty(sum(map(_bytes, xs)), dtype=torch.uint8, device=device)
    return bits, torch.empty(len(xs), dtype=torch.float32, device=device)


def _rms(flat: Tensor, ctx: TensorCtx) -> Tensor:
    """0-d float32."""
    norm = ops.two_norm(flat.to(ctx.work_dtype))
    size: Tensor = norm / max(flat.numel(), 1) ** 0.5
    return size.to(torch.float32)


def _together(xs: Sequence[Tensor]) -> bool:
    """Whether one call writes the bits that a call for each would: scales are divided in float32."""
    return len(xs) > 1 and all(x.dtype == torch.float32 for x in xs)


def _rows(payloads: Sequence[Sequence[Payload]]) -> tuple[list[Tensor], Tensor]:
    """Of each rank the signs of all, and the scales of their mean: (ranks, count)."""
    rows = [_joined(row) for row in zip(*payloads, strict=True)]
    return [bits for bits, _ in rows], torch.stack([sizes for _, sizes in rows]) / len(rows)


def _joined_sent(sent: Sequence[Tensor | None]) -> Tensor | None:
    """(count,), 0 where nothing is to be taken; None: of all."""
    known = [mean for mean in sent if mean is not None]
    if not known:
        return None
    nothing = known[0].new_zeros(1)
    return torch.cat([nothing if mean is None else mean for mean in sent])


def _joined(payloads: Sequence[Payload]) -> tuple[Tensor, Tensor]:
    """The signs of all, one after another, and their scales."""
    return torch.cat([bits for bits, _ in payloads]), torch.cat([size for _, size in payloads])

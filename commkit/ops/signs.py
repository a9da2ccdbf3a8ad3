"""Pure-torch kernels of one bit per element. Every product and sum is rounded by itself."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Multiplying by this gathers one bit of each byte into the top byte; no two partial products meet, so
# nothing carries.
_GATHER_1_OF_8 = sum(1 << (56 - 7 * k) for k in range(8))


@functools.lru_cache(maxsize=32)
def _sign_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device)
    return ((bits & 1) * 2 - 1).to(dtype)


def pack_signs(x: Tensor) -> Tensor:
    """Bit k of byte j is ``x[8 j + k] >= 0`` (so sgn(0) = +1); bits past the end are 0."""
    flags = x >= 0
    missing = -x.numel() % 8
    padded = torch.nn.functional.pad(flags, (0, missing)) if missing else flags.contiguous()
    return ((padded.view(torch.int64) * _GATHER_1_OF_8) >> 56).to(torch.uint8)


def unpack_signs(bits: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """(numel,) of -1 and +1."""
    table = _sign_table(dtype, bits.device)
    return table.index_select(0, bits.to(torch.int32)).view(-1)[:numel]


def encode_signs(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bits of :func:`pack_signs`, and mean|x| as (1,) float32: not finite where ``x`` is not."""
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = torch.linalg.vector_norm(work, 1) / max(work.numel(), 1)
    return pack_signs(work), mean.to(torch.float32).view(1)


def _sum_signs(out: Tensor, bits: Sequence[Tensor], scales: Tensor) -> Tensor:
    total = unpack_signs(bits[0], out.numel(), out.dtype).mul_(scales[0])
    for row, scale in zip(bits[1:], scales[1:], strict=True):
        total.add_(unpack_signs(row, out.numel(), out.dtype).mul_(scale))
    return total


def write_signs_(out: Tensor, bits: Sequence[Tensor], scales: Tensor) -> None:
    """``out = scales[0] * sgn_0 + scales[1] * sgn_1 + ...``, added up in this order."""
    out.copy_(_sum_signs(out, bits, scales))


def accumulate_signs_(out: Tensor, bits: Sequence[Tensor], scales: Tensor) -> None:
    """``out += scales[0] * sgn_0 + ...``; the sum is formed first."""
    out.add_(_sum_signs(out, bits, scales))


def encode_signs_compensated_(
    residual: Tensor, gradient: Tensor, decay: float, sent: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``residual = (residual - sent * sgn(residual)) * decay + gradient``, and :func:`encode_signs` of it."""
    if sent is not None:
        accumulate_signs_(residual, [pack_signs(residual)], -sent.to(residual.dtype))
    residual.mul_(decay).add_(gradient)
    return encode_signs(residual)


def places_of_signs(xs: Sequence[Tensor]) -> Iterator[slice]:
    """Where the signs of each tensor lie in the buffer of all: one after another, each from a byte on."""
    end = 0
    for x in xs:
        begin, end = end, end + (x.numel() + 7) // 8
        yield slice(begin, end)


def foreach_encode_signs_(bits: Tensor, scales: Tensor, xs: Sequence[Tensor]) -> None:
    """:func:`encode_signs` of each tensor."""
    for i, (place, x) in enumerate(zip(places_of_signs(xs), xs, strict=True)):
        packed, scale = encode_signs(x)
        bits[place].copy_(packed)
        scales[i : i + 1].copy_(scale)


def foreach_encode_signs_compensated_(
    bits: Tensor,
    scales: Tensor,
    residuals: Sequence[Tensor],
    gradients: Sequence[Tensor],
    decay: float,
    sent: Tensor | None,
) -> None:
    """:func:`encode_signs_compensated_` of each pair."""
    places = places_of_signs(residuals)
    for i, (place, e, g) in enumerate(zip(places, residuals, gradients, strict=True)):
        own = None if sent is None else sent[i : i + 1]
        packed, scale = encode_signs_compensated_(e, g, decay, own)
        bits[place].copy_(packed)
        scales[i : i + 1].copy_(scale)


def foreach_encode_signs_of_sums_(
    bits: Tensor,
    scales: Tensor,
    sums: Sequence[Tensor],
    residuals: Sequence[Tensor],
    gradients: Sequence[Tensor],
    sent: Tensor | None,
) -> None:
    """:func:`foreach_encode_signs_compensated_` without decay, whose sums go to memory of their own."""
    for total, e in zip(sums, residuals, strict=True):
        total.copy_(e)
    foreach_encode_signs_compensated_(bits, scales, sums, gradients, 1.0, sent)


def foreach_reencode_signs_(
    bits: Tensor,
    scales: Tensor,
    sums: Sequence[Tensor],
    residuals: Sequence[Tensor],
    sent: Tensor | None,
    rows: Sequence[Tensor],
    row_scales: Tensor,
) -> None:
    """:func:`foreach_encode_signs_of_sums_`, whose gradients are what :func:`foreach_write_signs_` writes."""
    gradients = [torch.empty_like(total) for total in sums]
    foreach_write_signs_(gradients, rows, row_scales)
    foreach_encode_signs_of_sums_(bits, scales, sums, residuals, gradients, sent)


def foreach_write_signs_(outs: Sequence[Tensor], bits: Sequence[Tensor], scales: Tensor) -> None:
    """:func:`write_signs_` to each tensor."""
    for i, (place, out) in enumerate(zip(places_of_signs(outs), outs, strict=True)):
        write_signs_(out, [row[place] for row in bits], scales[:, i].to(out.dtype))


def foreach_accumulate_signs_(
    outs: Sequence[Tensor], bits: Sequence[Tensor], scales: Tensor
) -> None:
    """:func:`accumulate_signs_` to each tensor."""
    for i, (place, out) in enumerate(zip(places_of_signs(outs), outs, strict=True)):
        accumulate_signs_(out, [row[place] for row in bits], scales[:, i].to(out.dtype))

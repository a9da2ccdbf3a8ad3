"""Compiled CUDA kernels of signs, but for the sums of one tensor, which are bound with the CPU's. Lists of tensors
are a launch or two for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .binding import DTYPES, all_flat, empty, flat, kernel, max_rows, run, workspace
from .native_signs import (
    accumulate_signs_,
    serves_compensation,
    serves_output,
    serves_rows,
    serves_sums,
    write_signs_,
)
from .signs import places_of_signs


@kernel("CUDA")
def pack_signs(x: Tensor) -> Tensor:
    """float32, bfloat16, float16."""
    if not flat(x):
        return reference.pack_signs(x)
    bits = empty(((x.numel() + 7) // 8,), torch.uint8, x.device)
    run("ck_encode_signs", x, DTYPES[x.dtype], x.numel(), bits, None, None)
    return bits


def _encode(
    x: Tensor,
    bits: Tensor,
    mean: Tensor,
    residual: Tensor | None = None,
    total: Tensor | None = None,
    decay: float = 1.0,
    sent: Tensor | None = None,
) -> None:
    dtype, n = DTYPES[x.dtype], x.numel()
    sums = workspace(x.device, "ck_cuda_encode_signs_workspace", n)
    if residual is None:
        run("ck_encode_signs", x, dtype, n, bits, mean, sums)
    else:
        run(
            "ck_encode_signs_compensated",
            *(x, dtype, n, residual, total, decay, sent, bits, mean, sums),
        )


def _room(x: Tensor) -> tuple[Tensor, Tensor]:
    bits = empty(((x.numel() + 7) // 8,), torch.uint8, x.device)
    return bits, empty((1,), torch.float32, x.device)


@kernel("CUDA")
def encode_signs(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32, bfloat16, float16. The mean is summed up in float64, in the same order on any GPU."""
    if not flat(x):
        return reference.encode_signs(x)
    bits, mean = _room(x)
    _encode(x, bits, mean)
    return bits, mean


@kernel("CUDA")
def encode_signs_compensated_(
    residual: Tensor, gradient: Tensor, decay: float, sent: Tensor | None
) -> tuple[Tensor, Tensor]:
    """float32, and a gradient of bfloat16 or float16 too. The mean is that of encode_signs."""
    if not serves_compensation([residual], [gradient], sent):
        return reference.encode_signs_compensated_(residual, gradient, decay, sent)
    bits, mean = _room(gradient)
    _encode(gradient, bits, mean, residual, residual, decay, sent)
    return bits, mean


@kernel("CUDA")
def foreach_encode_signs_(bits: Tensor, scales: Tensor, xs: Sequence[Tensor]) -> None:
    """float32, bfloat16, float16, also together."""
    if not (serves_output(bits, scales, xs) and all_flat(xs, bits.device)):
        reference.foreach_encode_signs_(bits, scales, xs)
        return
    for i, (place, x) in enumerate(zip(places_of_signs(xs), xs, strict=True)):
        _encode(x, bits[place], scales[i])


@kernel("CUDA")
def foreach_encode_signs_compensated_(
    bits: Tensor,
    scales: Tensor,
    residuals: Sequence[Tensor],
    gradients: Sequence[Tensor],
    decay: float,
    sent: Tensor | None,
) -> None:
    """float32, and gradients of bfloat16 and float16 too."""
    if not (
        serves_output(bits, scales, gradients) and serves_compensation(residuals, gradients, sent)
    ):
        reference.foreach_encode_signs_compensated_(bits, scales, residuals, gradients, decay, sent)
        return
    places = places_of_signs(gradients)
    for i, (place, e, g) in enumerate(zip(places, residuals, gradients, strict=True)):
        _encode(g, bits[place], scales[i], e, e, decay, None if sent is None else sent[i])


@kernel("CUDA")
def foreach_encode_signs_of_sums_(
    bits: Tensor,
    scales: Tensor,
    sums: Sequence[Tensor],
    residuals: Sequence[Tensor],
    gradients: Sequence[Tensor],
    sent: Tensor | None,
) -> None:
    """float32, and gradients of bfloat16 and float16 too."""
    if not (
        serves_output(bits, scales, gradients) and serves_sums(sums, residuals, gradients, sent)
    ):
        reference.foreach_encode_signs_of_sums_(bits, scales, sums, residuals, gradients, sent)
        return
    places = places_of_signs(gradients)
    for i, (place, *each) in enumerate(zip(places, sums, residuals, gradients, strict=True)):
        total, e, g = each
        _encode(g, bits[place], scales[i], e, total, sent=None if sent is None else sent[i])


@kernel("CUDA")
def foreach_reencode_signs_(
    bits: Tensor,
    scales: Tensor,
    sums: Sequence[Tensor],
    residuals: Sequence[Tensor],
    sent: Tensor | None,
    rows: Sequence[Tensor],
    row_scales: Tensor,
) -> None:
    """float32."""
    if not (
        serves_output(bits, scales, sums)
        and serves_sums(sums, residuals, sums, sent)
        and serves_rows(sums, rows, row_scales)
        and len(rows) <= max_rows(bits.device)
    ):
        reference.foreach_reencode_signs_(bits, scales, sums, residuals, sent, rows, row_scales)
        return
    columns = row_scales.t().contiguous()
    for i, (place, total, e) in enumerate(zip(places_of_signs(sums), sums, residuals, strict=True)):
        n, own = total.numel(), None if sent is None else sent[i]
        run(
            "ck_reencode_signs",
            *(total, n, [row[place] for row in rows], columns[i], len(rows), e, own),
            *(bits[place], scales[i], workspace(total.device, "ck_cuda_encode_signs_workspace", n)),
        )


@kernel("CUDA")
def foreach_write_signs_(outs: Sequence[Tensor], bits: Sequence[Tensor], scales: Tensor) -> None:
    """float32."""
    columns = scales.t().contiguous()
    for place, out, column in zip(places_of_signs(outs), outs, columns, strict=True):
        write_signs_(out, [row[place] for row in bits], column.to(out.dtype))


@kernel("CUDA")
def foreach_accumulate_signs_(
    outs: Sequence[Tensor], bits: Sequence[Tensor], scales: Tensor
) -> None:
    """float32."""
    columns = scales.t().contiguous()
    for place, out, column in zip(places_of_signs(outs), outs, columns, strict=True):
        accumulate_signs_(out, [row[place] for row in bits], column.to(out.dtype))

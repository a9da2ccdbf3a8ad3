"""Compiled kernels of signs."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .binding import DTYPES, all_flat, empty, fits, flat, kernel, max_rows, run


def _encode_signs(x: Tensor, l1: Any) -> Tensor:
    bits = empty(((x.numel() + 7) // 8,), torch.uint8, x.device)
    run("ck_encode_signs", x, DTYPES[x.dtype], x.numel(), bits, l1)
    return bits


@kernel()
def pack_signs(x: Tensor) -> Tensor:
    """float32, bfloat16, float16."""
    return _encode_signs(x, None) if flat(x) else reference.pack_signs(x)


@kernel()
def encode_signs(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32, bfloat16, float16. The mean is summed up in float64."""
    if not flat(x):
        return reference.encode_signs(x)
    l1 = ctypes.c_double()
    bits = _encode_signs(x, ctypes.byref(l1))
    return bits, torch.tensor([l1.value / max(x.numel(), 1)], dtype=torch.float32)


def _sum_signs(out: Tensor, bits: Sequence[Tensor], scales: Tensor, accumulate: bool) -> bool:
    n, size = out.numel(), (out.numel() + 7) // 8
    if not (
        flat(out, torch.float32)
        and 1 <= len(bits) <= max_rows(out.device)
        and fits(scales, len(bits), torch.float32, out.device)
        and all(fits(row, size, torch.uint8, out.device) for row in bits)
    ):
        return False
    run("ck_sum_signs", out, n, list(bits), scales, len(bits), accumulate)
    return True


@kernel("CPU", "CUDA")
def write_signs_(out: Tensor, bits: Sequence[Tensor], scales: Tensor) -> None:
    """float32."""
    if not _sum_signs(out, bits, scales, False):
        reference.write_signs_(out, bits, scales)


@kernel("CPU", "CUDA")
def accumulate_signs_(out: Tensor, bits: Sequence[Tensor], scales: Tensor) -> None:
    """float32."""
    if not _sum_signs(out, bits, scales, True):
        reference.accumulate_signs_(out, bits, scales)


@kernel("CPU", "CUDA")
def unpack_signs(bits: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """float32."""
    if dtype == torch.float32:
        out = empty((numel,), torch.float32, bits.device)
        if _sum_signs(out, [bits], torch.ones(1, device=bits.device), False):
            return out
    return reference.unpack_signs(bits, numel, dtype)


def serves_compensation(
    residuals: Sequence[Tensor], gradients: Sequence[Tensor], sent: Tensor | None
) -> bool:
    """float32, and gradients of bfloat16 and float16 too."""
    if not residuals:
        return not gradients
    device = residuals[0].device
    return (
        len(residuals) == len(gradients)
        and all_flat(gradients, device)
        and all_flat(residuals, device, torch.float32)
        and all(e.numel() == g.numel() for e, g in zip(residuals, gradients, strict=True))
        and (sent is None or fits(sent, len(residuals), torch.float32, device))
    )


def serves_sums(
    sums: Sequence[Tensor],
    residuals: Sequence[Tensor],
    gradients: Sequence[Tensor],
    sent: Tensor | None,
) -> bool:
    """float32, and gradients of bfloat16 and float16 too."""
    return serves_compensation(residuals, gradients, sent) and serves_compensation(
        sums, gradients, None
    )


def _encode_all(
    bits: Tensor,
    scales: Tensor,
    xs: Sequence[Tensor],
    residuals: list[Tensor] | None = None,
    sums: list[Tensor] | None = None,
    decay: float = 1.0,
    sent: Tensor | None = None,
) -> None:
    dtypes = (ctypes.c_int * len(xs))(*(DTYPES[x.dtype] for x in xs))
    run(
        "ck_foreach_encode_signs",
        *(bits, scales, list(xs), dtypes, _sizes(xs), len(xs), residuals, sums, decay, sent),
    )


def _sizes(xs: Sequence[Tensor]) -> Any:
    return (ctypes.c_int64 * len(xs))(*(x.numel() for x in xs))


def serves_output(bits: Tensor, scales: Tensor, xs: Sequence[Tensor]) -> bool:
    """Whether there is room for the signs and scales of all, and they are where compiled kernels run."""
    size = sum((x.numel() + 7) // 8 for x in xs)
    return fits(bits, size, torch.uint8, bits.device) and fits(
        scales, len(xs), torch.float32, bits.device
    )


@kernel()
def encode_signs_compensated_(
    residual: Tensor, gradient: Tensor, decay: float, sent: Tensor | None
) -> tuple[Tensor, Tensor]:
    """float32, and a gradient of bfloat16 or float16 too. The mean is that of encode_signs."""
    if not serves_compensation([residual], [gradient], sent):
        return reference.encode_signs_compensated_(residual, gradient, decay, sent)
    bits = empty(((gradient.numel() + 7) // 8,), torch.uint8, gradient.device)
    scale = torch.empty(1)
    _encode_all(bits, scale, [gradient], [residual], [residual], decay, sent)
    return bits, scale


@kernel()
def foreach_encode_signs_(bits: Tensor, scales: Tensor, xs: Sequence[Tensor]) -> None:
    """float32, bfloat16, float16, also together. The means are those of encode_signs."""
    if serves_output(bits, scales, xs) and all_flat(xs, bits.device):
        _encode_all(bits, scales, xs)
    else:
        reference.foreach_encode_signs_(bits, scales, xs)


@kernel()
def foreach_encode_signs_compensated_(
    bits: Tensor,
    scales: Tensor,
    residuals: Sequence[Tensor],
    gradients: Sequence[Tensor],
    decay: float,
    sent: Tensor | None,
) -> None:
    """float32, and gradients of bfloat16 and float16 too. The means are those of encode_signs."""
    if serves_output(bits, scales, gradients) and serves_compensation(residuals, gradients, sent):
        _encode_all(bits, scales, gradients, list(residuals), list(residuals), decay, sent)
    else:
        reference.foreach_encode_signs_compensated_(bits, scales, residuals, gradients, decay, sent)


@kernel()
def foreach_encode_signs_of_sums_(
    bits: Tensor,
    scales: Tensor,
    sums: Sequence[Tensor],
    residuals: Sequence[Tensor],
    gradients: Sequence[Tensor],
    sent: Tensor | None,
) -> None:
    """float32, and gradients of bfloat16 and float16 too. The means are those of encode_signs."""
    if serves_output(bits, scales, gradients) and serves_sums(sums, residuals, gradients, sent):
        _encode_all(bits, scales, gradients, list(residuals), list(sums), sent=sent)
    else:
        reference.foreach_encode_signs_of_sums_(bits, scales, sums, residuals, gradients, sent)


@kernel()
def foreach_reencode_signs_(
    bits: Tensor,
    scales: Tensor,
    sums: Sequence[Tensor],
    residuals: Sequence[Tensor],
    sent: Tensor | None,
    rows: Sequence[Tensor],
    row_scales: Tensor,
) -> None:
    """float32. The means are those of encode_signs."""
    if (
        serves_output(bits, scales, sums)
        and serves_sums(sums, residuals, sums, sent)
        and serves_rows(sums, rows, row_scales)
    ):
        run(
            "ck_foreach_reencode_signs",
            *(bits, scales, row_scales, list(rows), len(rows), list(residuals), list(sums)),
            *(_sizes(sums), len(sums), sent),
        )
    else:
        reference.foreach_reencode_signs_(bits, scales, sums, residuals, sent, rows, row_scales)


def serves_rows(outs: Sequence[Tensor], bits: Sequence[Tensor], scales: Tensor) -> bool:
    """float32."""
    size = sum((out.numel() + 7) // 8 for out in outs)
    return (
        all_flat(outs, scales.device, torch.float32)
        and scales.shape == (len(bits), len(outs))
        and scales.is_contiguous()
        and flat(scales.view(-1), torch.float32)
        and all(fits(row, size, torch.uint8, scales.device) for row in bits)
    )


def _foreach_sum_signs(
    outs: Sequence[Tensor], bits: Sequence[Tensor], scales: Tensor, accumulate: bool
) -> bool:
    if not serves_rows(outs, bits, scales):
        return False
    run(
        "ck_foreach_sum_signs",
        *(scales, list(bits), len(bits), list(outs), _sizes(outs), len(outs), accumulate),
    )
    return True


@kernel()
def foreach_write_signs_(outs: Sequence[Tensor], bits: Sequence[Tensor], scales: Tensor) -> None:
    """float32."""
    if not _foreach_sum_signs(outs, bits, scales, False):
        reference.foreach_write_signs_(outs, bits, scales)


@kernel()
def foreach_accumulate_signs_(
    outs: Sequence[Tensor], bits: Sequence[Tensor], scales: Tensor
) -> None:
    """float32."""
    if not _foreach_sum_signs(outs, bits, scales, True):
        reference.foreach_accumulate_signs_(outs, bits, scales)

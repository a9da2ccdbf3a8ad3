"""Typed front ends of the operators of signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from . import definitions  # noqa: F401  (defines the operators)
from .checks import (
    check_compensation,
    check_foreach_sign_rows,
    check_sign_output,
    check_sign_rows,
    check_sums,
)

_ops = torch.ops.commkit


def pack_signs(x: Tensor) -> Tensor:
    """(n,) float -> (ceil(n/8),) uint8; bit k of byte j is ``x[8 j + k] >= 0``."""
    return cast(Tensor, _ops.pack_signs(x))


def unpack_signs(bits: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`pack_signs`: (numel,) of -1 and +1 in ``dtype``."""
    return cast(Tensor, _ops.unpack_signs(bits, numel, dtype))


def encode_signs(x: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) float -> the bits of :func:`pack_signs`, and mean|x| as (1,) float32, in one pass. The mean is
    not finite if ``x`` is not."""
    return cast(tuple[Tensor, Tensor], _ops.encode_signs(x))


def write_signs_(out: Tensor, bits: Sequence[Tensor], scales: Tensor) -> None:
    """``out = sum_i scales[i] * sgn_i`` in place, in this order and without temporaries.

    Args:
        out: (n,) of floats.
        bits: one or more results of :func:`pack_signs` of n elements.
        scales: one for each, of the dtype of ``out``.

    Raises:
        TypeError, ValueError: a wrong dtype or size; the message names the argument.
    """
    check_sign_rows(out, bits, scales)
    _ops.write_signs_(out, bits, scales)


def accumulate_signs_(out: Tensor, bits: Sequence[Tensor], scales: Tensor) -> None:
    """``out += sum_i scales[i] * sgn_i``, otherwise as :func:`write_signs_`. The sum is formed first, so
    that one row of negative scale is a subtraction, bit for bit."""
    check_sign_rows(out, bits, scales)
    _ops.accumulate_signs_(out, bits, scales)


def encode_signs_compensated_(
    residual: Tensor, gradient: Tensor, decay: float = 1.0, sent: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Error feedback and :func:`encode_signs` in one pass: ``residual = decay residual + gradient`` in place, and
    the bits and the mean magnitude of the result (Seide et al. 2014; Karimireddy et al. 2019).

    What is sent still has to be taken from ``residual``. Either at once, in a second pass:
    ``accumulate_signs_(residual, [bits], -scale)``. Or not before the next call, which does it on its way, given
    ``sent=scale``: the signs that were sent are those of ``residual`` itself. Between the calls it then holds
    ``scale * sgn(residual)`` too much. Both give the same bits.

    Args:
        residual: (n,) contiguous, of float32 (of float64 for such a gradient), written over.
        gradient: (n,) float on the same device; another tensor.
        decay: share of the residual that is carried on. At 1 the result is that of ``torch.add``; below, the
            product and the sum are rounded one after the other.
        sent: None, or (1,) float32: ``residual`` stands for ``residual - sent * sgn(residual)``, with
            sgn(0) = 1.

    Returns:
        (ceil(n/8),) uint8 and (1,) float32, as :func:`encode_signs` returns them of the new ``residual``.

    Raises:
        TypeError, ValueError: a wrong dtype, size or device; the message names the argument.
    """
    check_compensation([residual], [gradient], sent)
    return cast(
        tuple[Tensor, Tensor], _ops.encode_signs_compensated_(residual, gradient, decay, sent)
    )


def foreach_encode_signs_(bits: Tensor, scales: Tensor, xs: Sequence[Tensor]) -> None:
    """:func:`encode_signs` of many tensors in one call, into one buffer.

    The signs of ``xs[i]``, of n_i elements, fill ``ceil(n_i / 8)`` bytes, from the byte after those of
    ``xs[i - 1]`` on; unused bits of its last byte are 0. Each tensor has its own scale.

    Args:
        bits: (sum of ceil(n_i / 8),) uint8, written over.
        scales: (count,) float32, written over: mean|x| of each; 0 of a tensor of no elements.
        xs: (n_i,) floats of any dtype each, on the device of ``bits``; none at all is fine.

    Raises:
        TypeError, ValueError: a wrong dtype, size or device; the message names the argument.
    """
    check_sign_output(bits, scales, "xs", xs)
    _ops.foreach_encode_signs_(bits, scales, list(xs))


def foreach_encode_signs_compensated_(
    bits: Tensor,
    scales: Tensor,
    residuals: Sequence[Tensor],
    gradients: Sequence[Tensor],
    decay: float = 1.0,
    sent: Tensor | None = None,
) -> None:
    """:func:`encode_signs_compensated_` of many tensors in one call.

    Args:
        bits, scales: as for :func:`foreach_encode_signs_`.
        residuals, gradients: as for one call each; of one length. No two residuals share memory.
        decay: of all.
        sent: None, or (count,) float32, the one of each.

    Raises:
        TypeError, ValueError: a wrong dtype, size or device; the message names the argument.
    """
    check_sign_output(bits, scales, "gradients", gradients)
    check_compensation(residuals, gradients, sent)
    _ops.foreach_encode_signs_compensated_(
        bits, scales, list(residuals), list(gradients), decay, sent
    )


def foreach_encode_signs_of_sums_(
    bits: Tensor,
    scales: Tensor,
    sums: Sequence[Tensor],
    residuals: Sequence[Tensor],
    gradients: Sequence[Tensor],
    sent: Tensor | None = None,
) -> None:
    """Error feedback that can be undone: ``sums[i] = residuals[i] + gradients[i]``, as ``torch.add`` rounds it, and
    :func:`encode_signs` of the sum, in one pass that leaves residuals as they were.

    Args:
        bits, scales: as for :func:`foreach_encode_signs_`.
        sums: (n_i,) contiguous, of the dtype of the residual, written over. No two share memory, nor with what
            is read.
        residuals, gradients, sent: as for :func:`foreach_encode_signs_compensated_`, only read.

    Raises:
        TypeError, ValueError: a wrong dtype, size or device; the message names the argument.
    """
    check_sign_output(bits, scales, "gradients", gradients)
    check_compensation(residuals, gradients, sent)
    check_sums(sums, {"residuals": residuals, "gradients": gradients})
    _ops.foreach_encode_signs_of_sums_(
        bits, scales, list(sums), list(residuals), list(gradients), sent
    )


def foreach_reencode_signs_(
    bits: Tensor,
    scales: Tensor,
    sums: Sequence[Tensor],
    residuals: Sequence[Tensor],
    sent: Tensor | None,
    rows: Sequence[Tensor],
    row_scales: Tensor,
) -> None:
    """The server's half of a two-shot reduction in one pass: :func:`foreach_encode_signs_of_sums_`, whose gradients
    are what :func:`foreach_write_signs_` would write of ``rows``, bit for bit.

    Args:
        bits, scales, sums, residuals, sent: as for :func:`foreach_encode_signs_of_sums_`.
        rows, row_scales: ``bits`` and ``scales`` of :func:`foreach_write_signs_`.

    Raises:
        TypeError, ValueError: a wrong dtype, size or device; the message names the argument.
    """
    check_sign_output(bits, scales, "sums", sums)
    check_foreach_sign_rows("sums", sums, rows, row_scales)
    check_compensation(residuals, sums, sent, "sum")
    check_sums(sums, {"residuals": residuals})
    _ops.foreach_reencode_signs_(
        bits, scales, list(sums), list(residuals), sent, list(rows), row_scales
    )


def foreach_write_signs_(outs: Sequence[Tensor], bits: Sequence[Tensor], scales: Tensor) -> None:
    """:func:`write_signs_` to many tensors in one call: ``outs[i] = sum_r scales[r, i] * sgn_{r, i}``, in this
    order.

    Args:
        outs: (n_i,) each, of floats of one dtype, on one device; none at all is fine.
        bits: one or more rows, one of each peer, as :func:`foreach_encode_signs_` writes them for tensors of
            these sizes: (sum of ceil(n_i / 8),) uint8.
        scales: (rows, count) float32, contiguous.

    Raises:
        TypeError, ValueError: a wrong dtype, size or device; the message names the argument.
    """
    check_foreach_sign_rows("outs", outs, bits, scales)
    _ops.foreach_write_signs_(list(outs), list(bits), scales)


def foreach_accumulate_signs_(
    outs: Sequence[Tensor], bits: Sequence[Tensor], scales: Tensor
) -> None:
    """``outs[i] += sum_r scales[r, i] * sgn_{r, i}``, otherwise as :func:`foreach_write_signs_`. The sum is
    formed first, so that one row of negative scales is a subtraction, bit for bit."""
    check_foreach_sign_rows("outs", outs, bits, scales)
    _ops.foreach_accumulate_signs_(list(outs), list(bits), scales)

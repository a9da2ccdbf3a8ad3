"""Typed front ends of the ``commkit::`` operators: what the rest of the library calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from . import definitions  # noqa: F401  (defines the operators)
from .checks import (
    check_alike,
    check_block_rows,
    check_block_size,
    check_correction,
    check_floats,
    check_k,
    check_tiles,
)

_ops = torch.ops.commkit


def uniform_noise(numel: int, seed: int, device: torch.device) -> Tensor:
    """(numel,) float32 uniform in [0, 1), a pure function of (seed, index) on every device."""
    return cast(Tensor, _ops.uniform_noise(numel, seed, device))


def ternarize(x: Tensor, scale: Tensor, seed: int) -> Tensor:
    """(n,) float, 0-d float32 scale -> (n,) int8 in {-1, 0, 1} with ``scale * E[code] = x``."""
    return cast(Tensor, _ops.ternarize(x, scale, seed))


def pack_ternary(codes: Tensor) -> Tensor:
    """(n,) int8 in {-1, 0, 1} -> (ceil(n/4),) uint8, 2 bits each."""
    return cast(Tensor, _ops.pack_ternary(codes))


def unpack_ternary(packed: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`pack_ternary`: (numel,) of -1, 0 and +1 in ``dtype``."""
    return cast(Tensor, _ops.unpack_ternary(packed, numel, dtype))


def pack_nibbles(codes: Tensor) -> Tensor:
    """(n,) int8 in [-8, 7] -> (ceil(n/2),) uint8, 4 bits each."""
    return cast(Tensor, _ops.pack_nibbles(codes))


def unpack_nibbles(packed: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`pack_nibbles`: (numel,) of -8 to 7 in ``dtype``."""
    return cast(Tensor, _ops.unpack_nibbles(packed, numel, dtype))


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """(n,) int8 -> (ceil(n bits / 8),) uint8: codes in [-1, 1] at 2 bits, [-8, 7] at 4, any at 8."""
    if bits == 8:
        return codes.view(torch.uint8)
    return pack_ternary(codes) if bits == 2 else pack_nibbles(codes)


def unpack_codes(packed: Tensor, numel: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`pack_codes`: (numel,) in ``dtype``, a fresh tensor."""
    if bits == 8:
        return packed.view(torch.int8).to(dtype, copy=True)
    unpack = unpack_ternary if bits == 2 else unpack_nibbles
    return unpack(packed, numel, dtype)


def quantize_blocks(
    x: Tensor, bits: int, block_size: int, stochastic: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """(n,) float -> codes uint8, (n,) at 8 bits or (ceil(n/2),) at 4, and (ceil(n/block_size),) float32
    scales. ``seed`` is used by stochastic rounding alone."""
    return cast(tuple[Tensor, Tensor], _ops.quantize_blocks(x, bits, block_size, stochastic, seed))


def dequantize_blocks(
    codes: Tensor, scales: Tensor, numel: int, bits: int, block_size: int
) -> Tensor:
    """Inverse of :func:`quantize_blocks` up to rounding: (numel,) float32."""
    return cast(Tensor, _ops.dequantize_blocks(codes, scales, numel, bits, block_size))


def write_blocks_(
    out: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: int,
    block_size: int,
    divisor: int,
) -> None:
    """``out = sum_i dequantize_blocks(codes[i], scales[i]) / divisor`` in place, added up in this order.

    Args:
        out: (n,) of floats.
        codes: one or more codes of :func:`quantize_blocks` of n elements; at 2 bits, of :func:`pack_ternary`.
        scales: the scales of each, one per block.

    Raises:
        TypeError, ValueError: a wrong dtype or size; the message names the argument.
    """
    check_block_rows(out, codes, scales, bits, block_size, divisor)
    _ops.write_blocks_(out, codes, scales, bits, block_size, divisor)


def accumulate_blocks_(
    out: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: int,
    block_size: int,
    divisor: int,
) -> None:
    """``out += sum_i dequantize_blocks(codes[i], scales[i]) / divisor``, otherwise as :func:`write_blocks_`. The sum
    is formed first."""
    check_block_rows(out, codes, scales, bits, block_size, divisor)
    _ops.accumulate_blocks_(out, codes, scales, bits, block_size, divisor)


def quantize_e3m0(x: Tensor, block_size: int, stochastic: bool, seed: int) -> tuple[Tensor, Tensor]:
    """(n,) float -> (ceil(n/2),) uint8 codes of a sign and one of the magnitudes 0 and ``2^-6 S`` to ``S``,
    and (ceil(n/block_size),) float32 scales ``S = max|block|`` (Streaming DiLoCo, Douillard et al. 2025).
    Nearest in linear distance, ties to the smaller magnitude; ``seed`` is used by stochastic rounding alone.

    Raises:
        TypeError, ValueError: x or block_size is not as said.
    """
    check_floats("x", x)
    check_block_size(block_size)
    return cast(tuple[Tensor, Tensor], _ops.quantize_e3m0(x, block_size, stochastic, seed))


def dequantize_e3m0(codes: Tensor, scales: Tensor, numel: int, block_size: int) -> Tensor:
    """Inverse of :func:`quantize_e3m0` up to rounding: (numel,) float32."""
    return cast(Tensor, _ops.dequantize_e3m0(codes, scales, numel, block_size))


def write_e3m0_(
    out: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], block_size: int, divisor: int
) -> None:
    """:func:`write_blocks_` for codes of :func:`quantize_e3m0`."""
    check_block_rows(out, codes, scales, 4, block_size, divisor)
    _ops.write_e3m0_(out, codes, scales, block_size, divisor)


def accumulate_e3m0_(
    out: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], block_size: int, divisor: int
) -> None:
    """:func:`accumulate_blocks_` for codes of :func:`quantize_e3m0`."""
    check_block_rows(out, codes, scales, 4, block_size, divisor)
    _ops.accumulate_e3m0_(out, codes, scales, block_size, divisor)


def quantize_buckets(
    x: Tensor, levels: int, bucket_size: int, l2: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """(n,) float -> (n,) int8 codes in [-levels, levels] and (ceil(n/bucket_size),) float32 scales with
    ``scale * E[code] = x``; a scale is its bucket's 2-norm (else largest magnitude) over ``levels``."""
    return cast(tuple[Tensor, Tensor], _ops.quantize_buckets(x, levels, bucket_size, l2, seed))


def quantize_codebook(
    x: Tensor, levels: Tensor, block_size: int, stochastic: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """(n,) float, (k <= 256,) increasing float32 levels from below to above zero -> (n,) uint8 indices and
    (ceil(n/block_size),) float32 scales. ``seed`` is used by stochastic rounding alone."""
    return cast(
        tuple[Tensor, Tensor], _ops.quantize_codebook(x, levels, block_size, stochastic, seed)
    )


def dequantize_codebook(codes: Tensor, levels: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """Inverse of :func:`quantize_codebook` up to rounding: (n,) float32."""
    return cast(Tensor, _ops.dequantize_codebook(codes, levels, scales, block_size))


def quantize_natural(x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """(n,) float -> (n,) uint8 of sign and exponent, and ``top``, (1,) float32: the power of two that the
    largest code stands for. ``E`` of what is decoded is ``x``."""
    return cast(tuple[Tensor, Tensor], _ops.quantize_natural(x, seed))


def dequantize_natural(codes: Tensor, top: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`quantize_natural` up to rounding: (n,) of ``dtype``."""
    return cast(Tensor, _ops.dequantize_natural(codes, top, dtype))


def sample_threshold(x: Tensor, k: int, seed: int) -> Tensor:
    """0-d float32 estimate of the k-th largest ``|x|`` (DGC, section 3.1)."""
    return cast(Tensor, _ops.sample_threshold(x, k, seed))


def select_at_least(x: Tensor, threshold: Tensor) -> Tensor:
    """int64, increasing: where ``|x|`` is at least ``threshold`` (0-d float32), or NaN."""
    return cast(Tensor, _ops.select_at_least(x, threshold))


def largest_of_rows(x: Tensor, k: int) -> Tensor:
    """(rows, n) float -> (rows, k) int64, increasing in each row: where the k largest ``|x|`` are. Of equal
    ones the first are taken, and NaN before all.

    Raises:
        TypeError, ValueError: x is not a matrix of floats, or has fewer than k columns.
    """
    check_floats("x", x, 2)
    check_k(k, x.shape[1])
    return cast(Tensor, _ops.largest_of_rows(x, k))


def largest(x: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """The k elements of largest magnitude. Of equal ones the first are taken, and NaN before all.

    Args:
        x: (n,) float.
        k: from 0 to n.
        seed: of the sample that guides the search; the result does not depend on it.

    Returns:
        Where they are, (k,) int64, increasing, and what they are, (k,) float32 (float64 of such).

    Raises:
        TypeError, ValueError: x is not a vector of floats, or has fewer than k.
    """
    check_floats("x", x)
    check_k(k, x.numel())
    return cast(tuple[Tensor, Tensor], _ops.largest(x, k, seed))


def stratified_indices(numel: int, k: int, seed: int, device: torch.device) -> Tensor:
    """(k,) int64, strictly increasing: one uniform index from each of k strata of [0, numel)."""
    return cast(Tensor, _ops.stratified_indices(numel, k, seed, device))


def two_norm(x: Tensor) -> Tensor:
    """0-d 2-norm that neither over- nor underflows where the norm itself does not."""
    if x.device.type != "cpu":
        return _two_norm_float64(x)
    norm: Tensor = torch.linalg.vector_norm(x)  # 25 times faster on a CPU than summing in float64
    limits = torch.finfo(x.dtype)
    if float(norm) ** 2 > limits.tiny / limits.eps * x.numel() and bool(norm.isfinite()):
        return norm
    return _two_norm_float64(x)


def _two_norm_float64(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm.to(x.dtype)


def scatter_accumulate_(out: Tensor, indices: Tensor, values: Tensor) -> None:
    """``out[indices] += values`` in place; ``indices`` must not repeat."""
    _ops.scatter_accumulate_(out, indices, values)


def correct_momentum_(
    u: Tensor,
    v: Tensor,
    g: Tensor,
    velocity: Tensor | None,
    unsent: Tensor | None,
    momentum: float,
    nesterov: bool,
) -> None:
    """One step of DGC's momentum correction in one pass (Lin et al. 2018, equation 4): the new velocity and
    the new unsent are written to u and v.

    Args:
        u: (n,) of ``g``'s work dtype, with memory of its own.
        v: like u.
        g: (n,) float.
        velocity: u before, of the work dtype; None: there was none, and u is ``g``.
        unsent: v before; None: there was nothing.
        momentum: mu of ``u = mu u + g``, ``v = v + u``.
        nesterov: ``u = mu (u + g)``, ``v = v + u + g``.

    Raises:
        TypeError, ValueError: a wrong dtype, size or device; the message names the argument.
    """
    check_correction(u, v, g, velocity, unsent)
    _ops.correct_momentum_(u, v, g, velocity, unsent, momentum, nesterov)


def dgc_step_(
    u: Tensor,
    v: Tensor,
    g: Tensor,
    velocity: Tensor | None,
    unsent: Tensor | None,
    momentum: float,
    nesterov: bool,
    masking: bool,
    negligible: float,
    k: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """One step of Deep Gradient Compression in one pass: :func:`correct_momentum_`, then the k largest of v
    are taken out of it, and with ``masking`` u is 0 there (Lin et al. 2018, algorithm 4).

    Args:
        u, v, g, velocity, unsent, momentum, nesterov: as for :func:`correct_momentum_`.
        masking: whether what is taken out loses its velocity.
        negligible: magnitudes up to this one keep it: those of which nothing is left in the dtype they are
            sent in.
        k: from 0 to n.
        seed: of the sample that a kernel may use to find them; the result does not depend on it.

    Returns:
        Where they are, (k,) int64, increasing, and what v was there, (k,). Of equal magnitudes the first are
        taken, and NaN before all.

    Raises:
        TypeError, ValueError: a wrong dtype, size or device; the message names the argument.
    """
    check_correction(u, v, g, velocity, unsent)
    check_k(k, g.numel())
    return cast(
        tuple[Tensor, Tensor],
        _ops.dgc_step_(u, v, g, velocity, unsent, momentum, nesterov, masking, negligible, k, seed),
    )


def frozen_adam_(
    p: Tensor, exp_avg: Tensor, momentum: Tensor, denominator: Tensor, keep: float, size: float
) -> None:
    """A step of Adam whose variance is frozen, in place and in one pass: ``exp_avg = momentum``,
    ``p = keep p - size momentum / denominator``.

    Args:
        p: (n,) float32 or float64.
        exp_avg: like p, written over.
        momentum: like p.
        denominator: like p; inf where p shall not move.
        keep: 1 - lr * weight decay.
        size: lr over the bias correction.

    Raises:
        TypeError, ValueError: a wrong dtype, size or device; the message names the argument.
    """
    check_alike(
        "p", p, {"p": p, "exp_avg": exp_avg, "momentum": momentum, "denominator": denominator}
    )
    _ops.frozen_adam_(p, exp_avg, momentum, denominator, keep, size)


def combine_tiles_(
    out: Tensor,
    places: Sequence[Tensor],
    values: Sequence[Tensor],
    tall: Tensor,
    wide: Tensor,
    columns: int,
    subtract: bool,
) -> None:
    """The matrix of which a few coefficients of each tile are known, in place: ``out = X`` or ``out -= X``.

    Args:
        out: (n,) float; X by rows.
        places: one or more (tiles, k) int16: where in each tile's coefficients, (height, width) by rows;
            different ones in a row.
        values: for each, (tiles, k) like out. Of several the mean of those that are not 0 counts.
        tall: (height, height) like out; a tile is ``tall^T C wide``.
        wide: (width, width) like out.
        columns: tiles side by side; tiles are numbered along rows.
        subtract: take X from what is there.

    Raises:
        TypeError, ValueError, IndexError: a wrong dtype, size or place; the message names the argument.
    """
    check_tiles(out, places, values, tall, wide, columns)
    _ops.combine_tiles_(out, places, values, tall, wide, columns, subtract)

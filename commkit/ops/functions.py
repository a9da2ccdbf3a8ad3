"""Typed front ends of the ``commkit::`` operators: what the rest of the library calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from . import definitions  # noqa: F401  (defines the operators)
from .checks import check_block_rows, check_sign_rows

_ops = torch.ops.commkit


def uniform_noise(numel: int, seed: int, device: torch.device) -> Tensor:
    """(numel,) float32 uniform in [0, 1), a pure function of (seed, index) on every device."""
    return cast(Tensor, _ops.uniform_noise(numel, seed, device))


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
        codes: one or more codes of :func:`quantize_blocks` of n elements.
        scales: the scales of each.

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
    """int64, increasing: where ``|x|`` is at least ``threshold`` (0-d float32)."""
    return cast(Tensor, _ops.select_at_least(x, threshold))


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

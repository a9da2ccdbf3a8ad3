"""Pure-torch kernels: the meaning of every op, and what every other kernel is compared with.

The codes are here, the rest in ``noise``, ``selection``, ``signs``, ``tiles`` and ``updates``. Tensors are 1-D. Integer
arithmetic wraps. Nothing here draws from torch's global generator: randomness is a hash of (seed, element
index), the same on every device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .noise import uniform_noise as uniform_noise
from .selection import largest as largest
from .selection import largest_of_rows as largest_of_rows
from .selection import sample_threshold as sample_threshold
from .selection import scatter_accumulate_ as scatter_accumulate_
from .selection import select_at_least as select_at_least
from .selection import stratified_indices as stratified_indices
from .signs import accumulate_signs_ as accumulate_signs_
from .signs import encode_signs as encode_signs
from .signs import encode_signs_compensated_ as encode_signs_compensated_
from .signs import foreach_accumulate_signs_ as foreach_accumulate_signs_
from .signs import foreach_encode_signs_ as foreach_encode_signs_
from .signs import foreach_encode_signs_compensated_ as foreach_encode_signs_compensated_
from .signs import foreach_encode_signs_of_sums_ as foreach_encode_signs_of_sums_
from .signs import foreach_reencode_signs_ as foreach_reencode_signs_
from .signs import foreach_write_signs_ as foreach_write_signs_
from .signs import pack_signs as pack_signs
from .signs import unpack_signs as unpack_signs
from .signs import write_signs_ as write_signs_
from .tiles import combine_tiles_ as combine_tiles_
from .updates import correct_momentum_ as correct_momentum_
from .updates import dgc_step_ as dgc_step_
from .updates import frozen_adam_ as frozen_adam_

# Multiplying by this gathers two bits of each byte into the top byte; no two partial products meet, so
# nothing carries.
_GATHER_2_OF_8 = sum(1 << (24 - 6 * k) for k in range(4))


def _pad_to(x: Tensor, multiple: int) -> Tensor:
    missing = -x.numel() % multiple
    return torch.nn.functional.pad(x, (0, missing)) if missing else x.contiguous()


@functools.lru_cache(maxsize=32)
def _ternary_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    codes = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(0, 8, 2, device=device)
    return ((codes & 3) - 1).to(dtype)


@functools.lru_cache(maxsize=32)
def _nibble_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    codes = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(0, 8, 4, device=device)
    return ((codes & 15) - 8).to(dtype)


@functools.lru_cache(maxsize=32)
def natural_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256,): what the codes of :func:`quantize_natural` stand for, in units of the largest power."""
    sizes = [0.0, *(math.ldexp(1.0, code - 127) for code in range(1, 128))]
    return torch.tensor([*sizes, *(-size for size in sizes)], dtype=dtype, device=device)


def ternarize(x: Tensor, scale: Tensor, seed: int) -> Tensor:
    """int8 sgn(x) * Bernoulli(|x| / scale); 0 where the scale is 0."""
    probability = x.abs().to(torch.float32) / torch.where(scale > 0, scale, 1)
    kept = uniform_noise(x.numel(), seed, x.device) < probability
    return torch.sign(x).to(torch.int8) * kept


def pack_ternary(codes: Tensor) -> Tensor:
    """int8 in {-1, 0, 1} -> 2 bits each (code + 1), 4 per byte, the first in the lowest bits."""
    fields = _pad_to(codes + 1, 4).view(torch.int32)
    return ((fields * _GATHER_2_OF_8) >> 24).to(torch.uint8)


def unpack_ternary(packed: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """(numel,) of -1, 0 and +1."""
    table = _ternary_table(dtype, packed.device)
    return table.index_select(0, packed.to(torch.int32)).view(-1)[:numel]


def pack_nibbles(codes: Tensor) -> Tensor:
    """int8 in [-8, 7] -> 4 bits each (code + 8), 2 per byte, the first in the lower bits."""
    pairs = _pad_to(codes + 8, 2).view(torch.int16)
    return (pairs | (pairs >> 4)).to(torch.uint8)


def unpack_nibbles(packed: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """(numel,) of -8 to 7."""
    table = _nibble_table(dtype, packed.device)
    return table.index_select(0, packed.to(torch.int32)).view(-1)[:numel]


def quantize_blocks(
    x: Tensor, bits: int, block_size: int, stochastic: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """Symmetric linear codes with one scale per block: ``scale = max|block| / (2^(bits-1) - 1)``.

    Blocks below the smallest normal scale are sent as zeros: their reciprocal would be inf.
    """
    top = 2 ** (bits - 1) - 1
    blocks = _pad_to(x, block_size).view(-1, block_size)
    codes, scales = _round_linear(
        blocks, _peaks(blocks).div_(top), top, seed if stochastic else None
    )
    codes = codes.view(-1)[: x.numel()]
    return (codes.view(torch.uint8) if bits == 8 else pack_nibbles(codes)), scales


def quantize_buckets(
    x: Tensor, levels: int, bucket_size: int, l2: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """int8 codes in [-levels, levels], rounded up or down at random, with one scale per bucket: its 2-norm
    (or largest magnitude) over ``levels``.

    Small buckets are sent as zeros, as in :func:`quantize_blocks`.
    """
    buckets = _pad_to(x.to(torch.promote_types(x.dtype, torch.float32)), bucket_size)
    buckets = buckets.view(-1, bucket_size)
    if l2:  # in float64, where no square of a float is too large or too small
        scales = torch.linalg.vector_norm(buckets, dim=1, dtype=torch.float64)
        scales = scales.div_(levels).to(torch.float32)
    else:
        scales = _peaks(buckets).div_(levels)
    codes, scales = _round_linear(buckets, scales, levels, seed)
    return codes.view(-1)[: x.numel()], scales


def _peaks(blocks: Tensor) -> Tensor:
    low, high = torch.aminmax(blocks, dim=1)
    return torch.maximum(high, -low).to(torch.float32)


def _round_linear(
    blocks: Tensor, scales: Tensor, top: int, seed: int | None
) -> tuple[Tensor, Tensor]:
    """int8 codes of rows in units of their scales, of which those below the smallest normal one, whose
    reciprocal would be inf, are replaced by 0. Without a seed they are rounded to nearest."""
    too_small = scales < torch.finfo(torch.float32).tiny
    inverse = torch.where(too_small, 0, scales.reciprocal())
    y = blocks.to(torch.float32) * inverse.unsqueeze(1)
    if seed is None:
        y.round_()
    else:
        y.add_(uniform_noise(y.numel(), seed, y.device).view_as(y)).floor_()
    return y.clamp_(-top, top).to(torch.int8), scales.masked_fill(too_small, 0)


def dequantize_blocks(
    codes: Tensor, scales: Tensor, numel: int, bits: int, block_size: int
) -> Tensor:
    """(numel,) float32. At 2 bits codes are those of :func:`pack_ternary`, with scales of any origin."""
    if bits == 8:
        values = codes.view(torch.int8).to(torch.float32)
    else:
        unpack = unpack_ternary if bits == 2 else unpack_nibbles
        values = unpack(codes, numel, torch.float32)
    return _scale_blocks(values[:numel], scales, block_size)


def _sum_blocks(
    out: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: int,
    block_size: int,
    divisor: int,
) -> Tensor:
    values = (
        dequantize_blocks(row, own, out.numel(), bits, block_size)
        for row, own in zip(codes, scales, strict=True)
    )
    return _sum_shares(out, values, divisor)


def _sum_shares(out: Tensor, values: Iterable[Tensor], divisor: int) -> Tensor:
    shares = (x.to(out.dtype).div_(divisor) for x in values)
    total = next(shares)
    for share in shares:
        total.add_(share)
    return total


def write_blocks_(
    out: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: int,
    block_size: int,
    divisor: int,
) -> None:
    """``out`` = the sum of what the rows stand for, each divided by ``divisor``, added up in the
    dtype of ``out`` and in this order."""
    out.copy_(_sum_blocks(out, codes, scales, bits, block_size, divisor))


def accumulate_blocks_(
    out: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: int,
    block_size: int,
    divisor: int,
) -> None:
    """``out`` += the sum of what the rows stand for; the sum is formed first."""
    out.add_(_sum_blocks(out, codes, scales, bits, block_size, divisor))


def _scale_blocks(values: Tensor, scales: Tensor, block_size: int) -> Tensor:
    blocks = _pad_to(values, block_size).view(-1, block_size)
    return (blocks * scales.unsqueeze(1)).view(-1)[: values.numel()]


@functools.lru_cache(maxsize=8)
def _e3m0_table(device: torch.device) -> Tensor:
    sizes = [0.0, *(math.ldexp(1.0, code - 7) for code in range(1, 8))]
    return torch.tensor([*sizes, *(-size for size in sizes)], device=device)


def quantize_e3m0(x: Tensor, block_size: int, stochastic: bool, seed: int) -> tuple[Tensor, Tensor]:
    """4 bits per element, and per block the scale ``S = max|block|``. The lower three bits c of a code stand
    for 0 if c is 0, else for ``2^(c - 7) S``; the highest is the sign, 0 for c = 0. Two per byte, the first in
    the lower bits.

    With ``y = |x| / S`` between the levels a and b, ``p = (y - a) / (b - a)``: nearest takes b if p > 1/2,
    stochastic rounding if p > noise. In blocks whose scale is not finite every code is 0.
    """
    blocks = _pad_to(x.to(torch.float32), block_size).view(-1, block_size)
    low, high = torch.aminmax(blocks, dim=1)
    scales = torch.maximum(high, -low).abs_()  # never -0
    y = blocks.abs() / torch.where(scales > 0, scales, torch.inf).unsqueeze(1)
    mantissas, exponents = torch.frexp(y)  # y = mantissa * 2^exponent with the mantissa in [1/2, 1)
    graded = y >= 2**-6
    codes = torch.where(graded, exponents + 6, 0)
    p = torch.where(graded, 2 * mantissas - 1, 64 * y)
    codes += p > (uniform_noise(y.numel(), seed, x.device).view_as(y) if stochastic else 0.5)
    codes += ((blocks < 0) & (codes > 0)).to(codes.dtype) << 3
    codes = codes.to(torch.int8).view(-1)[: x.numel()]
    return pack_nibbles(codes - 8), scales


def dequantize_e3m0(codes: Tensor, scales: Tensor, numel: int, block_size: int) -> Tensor:
    """(numel,) float32."""
    fields = unpack_nibbles(codes, numel, torch.int32) + 8
    return _scale_blocks(_e3m0_table(codes.device).index_select(0, fields), scales, block_size)


def _sum_e3m0(
    out: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], block_size: int, divisor: int
) -> Tensor:
    values = (
        dequantize_e3m0(row, own, out.numel(), block_size)
        for row, own in zip(codes, scales, strict=True)
    )
    return _sum_shares(out, values, divisor)


def write_e3m0_(
    out: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], block_size: int, divisor: int
) -> None:
    """As :func:`write_blocks_`."""
    out.copy_(_sum_e3m0(out, codes, scales, block_size, divisor))


def accumulate_e3m0_(
    out: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], block_size: int, divisor: int
) -> None:
    """As :func:`accumulate_blocks_`."""
    out.add_(_sum_e3m0(out, codes, scales, block_size, divisor))


def quantize_codebook(
    x: Tensor, levels: Tensor, block_size: int, stochastic: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """uint8 indices into ``levels`` (at most 256, increasing, the first negative, the last positive), with
    the smallest scale per block that puts all of it between the first and the last level.

    Division in place of a reciprocal, which would be inf where the scale is denormal.
    """
    blocks = _pad_to(x.to(torch.float32), block_size).view(-1, block_size)
    low, high = torch.aminmax(blocks, dim=1)
    scales = (
        torch.maximum(high / levels[-1], low / levels[0]) + 0.0
    )  # of two zeros, the positive one
    y = blocks / torch.where(scales > 0, scales, torch.inf).unsqueeze(1)
    if stochastic:
        below = (torch.bucketize(y, levels, right=True) - 1).clamp_(0, levels.numel() - 2)
        lower = levels.index_select(0, below.view(-1)).view_as(y)
        gaps = levels.diff().index_select(0, below.view(-1)).view_as(y)
        noise = uniform_noise(y.numel(), seed, x.device).view_as(y)
        codes = below + (noise * gaps < y - lower)
    else:
        codes = torch.bucketize(y, (levels[1:] + levels[:-1]) / 2)
    return codes.to(torch.uint8).view(-1)[: x.numel()], scales


def dequantize_codebook(codes: Tensor, levels: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """(n,) float32."""
    return _scale_blocks(levels.index_select(0, codes.to(torch.int32)), scales, block_size)


def quantize_natural(x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """uint8: the sign in the highest bit, below it 0 for zero or 127 - k for ``top * 2^-k``; and ``top``,
    (1,) float32, the smallest power of two that no magnitude exceeds."""
    sizes = x.to(torch.promote_types(x.dtype, torch.float32)).abs()
    peak = sizes.amax() if sizes.numel() else sizes.new_zeros(())
    # size = mantissa * 2^exponent with the mantissa in [1/2, 1)
    mantissas, exponents = torch.frexp(sizes)
    mantissa, exponent = torch.frexp(peak)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    # peak / mantissa is a power of two, exactly; inf if float32 has none so large
    top = torch.where(mantissa > 0.5, peak / mantissa, peak)
    noise = uniform_noise(x.numel(), seed, x.device)
    depth = exponent - (exponents - 1)
    above = (127 - depth) + (noise < 2 * mantissas - 1)
    smallest = noise < torch.ldexp(mantissas, exponents + 126 - exponent)
    codes = torch.where(depth <= 126, above, smallest).clamp_(0, 127) * (mantissas > 0)
    codes += (x < 0).to(codes.dtype) << 7
    return codes.to(torch.uint8), top.to(torch.float32).view(1)


def dequantize_natural(codes: Tensor, top: Tensor, dtype: torch.dtype) -> Tensor:
    """(n,) of ``dtype``."""
    table = natural_table(dtype, codes.device)
    return table.index_select(0, codes.to(torch.int32)) * top.to(dtype)

"""Pure-torch kernels: the meaning of every op, and what every other kernel is compared with.

Tensors are 1-D. Integer arithmetic wraps. Nothing here draws from torch's global generator: randomness is
a hash of (seed, element index), the same on every device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Multiplying by these gathers one bit (two bits) of each byte into the top byte; no two partial products
# meet, so nothing carries.
_GATHER_1_OF_8 = sum(1 << (56 - 7 * k) for k in range(8))
_GATHER_2_OF_8 = sum(1 << (24 - 6 * k) for k in range(4))


def _pad_to(x: Tensor, multiple: int) -> Tensor:
    missing = -x.numel() % multiple
    return torch.nn.functional.pad(x, (0, missing)) if missing else x.contiguous()


@functools.lru_cache(maxsize=32)
def _sign_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device)
    return ((bits & 1) * 2 - 1).to(dtype)


@functools.lru_cache(maxsize=32)
def _ternary_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    codes = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(0, 8, 2, device=device)
    return ((codes & 3) - 1).to(dtype)


@functools.lru_cache(maxsize=32)
def _nibble_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    codes = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(0, 8, 4, device=device)
    return ((codes & 15) - 8).to(dtype)


@functools.lru_cache(maxsize=32)
def _natural_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    sizes = [0.0, *(math.ldexp(1.0, code - 127) for code in range(1, 128))]
    return torch.tensor([*sizes, *(-size for size in sizes)], dtype=dtype, device=device)


def _as_int32(value: int) -> int:
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)


def noise_keys(seed: int) -> tuple[int, int]:
    """Two int32 keys of a seed (splitmix64)."""
    z = (seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    z ^= z >> 31
    return _as_int32(z), _as_int32(z >> 32)


def uniform_noise(numel: int, seed: int, device: torch.device) -> Tensor:
    """(numel,) float32 in [0, 1), multiples of 2^-24: a 32-bit finaliser hash of the index, keyed twice
    so that two seeds never give shifted copies of one stream."""
    first, second = noise_keys(seed)
    x = torch.arange(numel, dtype=torch.int64, device=device).to(torch.int32)
    x += first
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x += second
    x ^= (x >> 15) & 0x1FFFF
    x *= _as_int32(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return ((x >> 8) & 0xFFFFFF).to(torch.float32).mul_(2.0**-24)


def pack_signs(x: Tensor) -> Tensor:
    """Bit k of byte j is ``x[8 j + k] >= 0`` (so sgn(0) = +1); bits past the end are 0."""
    flags = _pad_to(x >= 0, 8).view(torch.int64)
    return ((flags * _GATHER_1_OF_8) >> 56).to(torch.uint8)


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
    low, high = torch.aminmax(blocks, dim=1)
    scales = torch.maximum(high, -low).to(torch.float32).div_(top)
    too_small = scales < torch.finfo(torch.float32).tiny
    inverse = torch.where(too_small, 0, scales.reciprocal())
    scales.masked_fill_(too_small, 0)
    y = blocks.to(torch.float32) * inverse.unsqueeze(1)
    if stochastic:
        noise = uniform_noise(y.numel(), seed, x.device).view_as(y)
        y = y.add_(noise).floor_()
    else:
        y = y.round_()
    codes = y.clamp_(-top, top).to(torch.int8).view(-1)[: x.numel()]
    if bits == 8:
        return codes.view(torch.uint8), scales
    return pack_nibbles(codes), scales


def dequantize_blocks(
    codes: Tensor, scales: Tensor, numel: int, bits: int, block_size: int
) -> Tensor:
    """(numel,) float32."""
    if bits == 8:
        values = codes.view(torch.int8).to(torch.float32)
    else:
        values = unpack_nibbles(codes, numel, torch.float32)
    return _scale_blocks(values[:numel], scales, block_size)


def _sum_blocks(
    out: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: int,
    block_size: int,
    divisor: int,
) -> Tensor:
    def share(row: Tensor, own: Tensor) -> Tensor:
        values = dequantize_blocks(row, own, out.numel(), bits, block_size)
        return values.to(out.dtype).div_(divisor)

    total = share(codes[0], scales[0])
    for row, own in zip(codes[1:], scales[1:], strict=True):
        total.add_(share(row, own))
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


def quantize_buckets(
    x: Tensor, levels: int, bucket_size: int, l2: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """int8 codes in [-levels, levels], rounded up or down at random, with one scale per bucket: its 2-norm
    (or largest magnitude) over ``levels``.

    Buckets below the smallest normal scale are sent as zeros, as in ``quantize_blocks``.
    """
    buckets = _pad_to(x.to(torch.float32), bucket_size).view(-1, bucket_size)
    low, high = torch.aminmax(buckets, dim=1)
    peaks = torch.maximum(high, -low)
    scales = peaks / levels
    if l2:
        # Relative to the peak: squares of the elements themselves would over- or underflow.
        relative = buckets / torch.where(peaks > 0, peaks, torch.inf).unsqueeze(1)
        scales = scales * torch.linalg.vector_norm(relative, dim=1)
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, 0, scales)
    y = buckets / torch.where(scales > 0, scales, torch.inf).unsqueeze(1)
    floor = y.floor()
    y.sub_(floor)
    floor += uniform_noise(y.numel(), seed, x.device).view_as(y) < y
    codes = floor.clamp_(-levels, levels).to(torch.int8)
    return codes.view(-1)[: x.numel()], scales


def quantize_codebook(
    x: Tensor, levels: Tensor, block_size: int, stochastic: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """uint8 indices into ``levels`` (at most 256, increasing, the first negative, the last positive), with
    the smallest scale per block that puts all of it between the first and the last level.

    Division in place of a reciprocal, which would be inf where the scale is denormal.
    """
    blocks = _pad_to(x.to(torch.float32), block_size).view(-1, block_size)
    low, high = torch.aminmax(blocks, dim=1)
    scales = torch.maximum(high / levels[-1], low / levels[0])
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
    table = _natural_table(dtype, codes.device)
    return table.index_select(0, codes.to(torch.int32)) * top.to(dtype)


def sample_threshold(x: Tensor, k: int, seed: int) -> Tensor:
    """A 0-d estimate of the k-th largest ``|x|`` from a strided sample of about 1 % of ``x``.

    The stride is odd and a multiple of 32 plus 1, its start random (Lin et al. 2018, section 3.1 and its
    public code); the sample holds at least 64 of the wanted elements, or is all of ``x``.
    """
    n = x.numel()
    wanted = min(n, max(n // 100, -(-64 * n // k)))
    stride = max(1, n // wanted)
    if stride > 32:
        stride = stride // 32 * 32 + 1
    sample = x[seed % stride :: stride].abs()
    rank = max(1, min(sample.numel(), round(k * sample.numel() / n)))
    return torch.topk(sample, rank, sorted=True).values[-1].to(torch.float32, copy=True)


def select_at_least(x: Tensor, threshold: Tensor) -> Tensor:
    """int64, increasing: where ``|x| >= threshold``, which NaN never is."""
    return (x.abs() >= threshold).nonzero().view(-1)


def stratified_indices(numel: int, k: int, seed: int, device: torch.device) -> Tensor:
    """(k,) int64, one uniform index from each of k consecutive strata of nearly equal length."""
    bounds = torch.arange(k + 1, dtype=torch.int64, device=device) * numel // max(k, 1)
    # 48 hash bits, so that the modulo bias stays below size / 2^48.
    high = uniform_noise(k, seed, device).double()
    low = uniform_noise(k, seed ^ 0x5BD1E995, device).double()
    u = high + low * 2.0**-24
    sizes = bounds[1:] - bounds[:-1]
    return bounds[:-1] + torch.minimum((u * sizes).long(), sizes - 1)


def scatter_accumulate_(out: Tensor, indices: Tensor, values: Tensor) -> None:
    """``out[indices] += values`` in place. Indices are unique, so that the result is deterministic."""
    positions = indices.long()
    out.index_copy_(0, positions, out.index_select(0, positions) + values.to(out.dtype))

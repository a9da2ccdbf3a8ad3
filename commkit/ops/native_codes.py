"""Compiled kernels of codes: fields of a byte, blocks with a scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .binding import (
    DTYPES,
    empty,
    fits,
    flat,
    is_scalar,
    kernel,
    keys,
    max_rows,
    run,
    scalar,
    usable,
)

_E3M0 = 3  # of csrc/kernels.h; the other codes are called by their bits


@kernel("BackendSelect")
def uniform_noise(numel: int, seed: int, device: torch.device) -> Tensor:
    """Any length. There is no tensor to choose a kernel by, so this one chooses."""
    if not usable(device):
        return reference.uniform_noise(numel, seed, device)
    out = empty((numel,), torch.float32, device)
    run("ck_uniform_noise", out, numel, keys(seed))
    return out


def _quantize(
    x: Tensor, code: int, block_size: int, stochastic: bool, seed: int
) -> tuple[Tensor, Tensor] | None:
    n = x.numel()
    if not (flat(x) and block_size >= 1 and code in (_E3M0, 4, 8)):
        return None
    if code != 8 and block_size % 2 and block_size < n:
        return None
    codes = empty((n if code == 8 else (n + 1) // 2,), torch.uint8, x.device)
    scales = empty(((n + block_size - 1) // block_size,), torch.float32, x.device)
    noise = keys(seed) if stochastic else None
    run("ck_quantize_blocks", x, DTYPES[x.dtype], n, code, block_size, noise, codes, scales)
    return codes, scales


def _sum_blocks(
    out: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    code: int,
    block_size: int,
    divisor: int,
    accumulate: bool,
) -> bool:
    n, width = out.numel(), 4 if code == _E3M0 else code
    if min(block_size, divisor) < 1 or width not in (2, 4, 8):
        return False
    if block_size * width % 8 and block_size < n:
        return False
    size, blocks = (n * width + 7) // 8, (n + block_size - 1) // block_size
    if not (
        flat(out, torch.float32)
        and 1 <= len(codes) == len(scales) <= max_rows(out.device)
        and all(fits(row, size, torch.uint8, out.device) for row in codes)
        and all(fits(row, blocks, torch.float32, out.device) for row in scales)
    ):
        return False
    rows = len(codes)
    run(
        "ck_sum_blocks",
        *(out, n, list(codes), list(scales), rows, code, block_size, divisor, accumulate),
    )
    return True


@kernel("CPU", "CUDA")
def quantize_blocks(
    x: Tensor, bits: int, block_size: int, stochastic: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """float32, bfloat16, float16; at 4 bits blocks of an even size."""
    done = _quantize(x, bits, block_size, stochastic, seed)
    return done or reference.quantize_blocks(x, bits, block_size, stochastic, seed)


@kernel("CPU")
def quantize_buckets(
    x: Tensor, levels: int, bucket_size: int, l2: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """float32, bfloat16, float16."""
    n = x.numel()
    if not (flat(x) and 1 <= levels <= 127 and bucket_size >= 1):
        return reference.quantize_buckets(x, levels, bucket_size, l2, seed)
    codes = empty((n,), torch.int8, x.device)
    scales = empty(((n + bucket_size - 1) // bucket_size,), torch.float32, x.device)
    where = (DTYPES[x.dtype], n, levels, bucket_size, l2, keys(seed), codes, scales)
    run("ck_quantize_buckets", x, *where)
    return codes, scales


@kernel("CPU", "CUDA")
def write_blocks_(
    out: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: int,
    block_size: int,
    divisor: int,
) -> None:
    """float32; blocks that begin at a byte."""
    if not _sum_blocks(out, codes, scales, bits, block_size, divisor, False):
        reference.write_blocks_(out, codes, scales, bits, block_size, divisor)


@kernel("CPU", "CUDA")
def accumulate_blocks_(
    out: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: int,
    block_size: int,
    divisor: int,
) -> None:
    """float32; blocks that begin at a byte."""
    if not _sum_blocks(out, codes, scales, bits, block_size, divisor, True):
        reference.accumulate_blocks_(out, codes, scales, bits, block_size, divisor)


@kernel("CPU", "CUDA")
def dequantize_blocks(
    codes: Tensor, scales: Tensor, numel: int, bits: int, block_size: int
) -> Tensor:
    """Blocks that begin at a byte."""
    out = empty((numel,), torch.float32, codes.device)
    if _sum_blocks(out, [codes], [scales], bits, block_size, 1, False):
        return out
    return reference.dequantize_blocks(codes, scales, numel, bits, block_size)


@kernel("CPU", "CUDA")
def quantize_e3m0(x: Tensor, block_size: int, stochastic: bool, seed: int) -> tuple[Tensor, Tensor]:
    """float32, bfloat16, float16; blocks of an even size."""
    done = _quantize(x, _E3M0, block_size, stochastic, seed)
    return done or reference.quantize_e3m0(x, block_size, stochastic, seed)


@kernel("CPU", "CUDA")
def write_e3m0_(
    out: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], block_size: int, divisor: int
) -> None:
    """float32; blocks of an even size."""
    if not _sum_blocks(out, codes, scales, _E3M0, block_size, divisor, False):
        reference.write_e3m0_(out, codes, scales, block_size, divisor)


@kernel("CPU", "CUDA")
def accumulate_e3m0_(
    out: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], block_size: int, divisor: int
) -> None:
    """float32; blocks of an even size."""
    if not _sum_blocks(out, codes, scales, _E3M0, block_size, divisor, True):
        reference.accumulate_e3m0_(out, codes, scales, block_size, divisor)


@kernel("CPU", "CUDA")
def dequantize_e3m0(codes: Tensor, scales: Tensor, numel: int, block_size: int) -> Tensor:
    """Blocks of an even size."""
    out = empty((numel,), torch.float32, codes.device)
    if _sum_blocks(out, [codes], [scales], _E3M0, block_size, 1, False):
        return out
    return reference.dequantize_e3m0(codes, scales, numel, block_size)


@kernel("CPU", "CUDA")
def ternarize(x: Tensor, scale: Tensor, seed: int) -> Tensor:
    """float32, bfloat16, float16; a scale of float32."""
    if not (flat(x) and is_scalar(scale, x.device)):
        return reference.ternarize(x, scale, seed)
    codes = empty((x.numel(),), torch.int8, x.device)
    run("ck_ternarize", x, DTYPES[x.dtype], x.numel(), scalar(scale), keys(seed), codes)
    return codes


def _pack(codes: Tensor, per_byte: int, function: str) -> Tensor:
    n = codes.numel()
    packed = empty(((n + per_byte - 1) // per_byte,), torch.uint8, codes.device)
    run(function, codes, n, packed)
    return packed


def _unpack(packed: Tensor, numel: int, dtype: torch.dtype, bits: int) -> Tensor | None:
    """One block of scale 1."""
    if dtype != torch.float32:
        return None
    out = empty((numel,), torch.float32, packed.device)
    one = torch.ones(min(numel, 1), device=packed.device)
    return out if _sum_blocks(out, [packed], [one], bits, max(numel, 1), 1, False) else None


@kernel("CPU", "CUDA")
def pack_ternary(codes: Tensor) -> Tensor:
    """int8."""
    if not flat(codes, torch.int8):
        return reference.pack_ternary(codes)
    return _pack(codes, 4, "ck_pack_ternary")


@kernel("CPU", "CUDA")
def unpack_ternary(packed: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """float32."""
    out = _unpack(packed, numel, dtype, 2)
    return reference.unpack_ternary(packed, numel, dtype) if out is None else out


@kernel("CPU", "CUDA")
def pack_nibbles(codes: Tensor) -> Tensor:
    """int8."""
    if not flat(codes, torch.int8):
        return reference.pack_nibbles(codes)
    return _pack(codes, 2, "ck_pack_nibbles")


@kernel("CPU", "CUDA")
def unpack_nibbles(packed: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """float32."""
    out = _unpack(packed, numel, dtype, 4)
    return reference.unpack_nibbles(packed, numel, dtype) if out is None else out

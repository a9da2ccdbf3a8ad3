"""Compiled kernels of codes that are places in a table: of levels, or of powers of two."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .binding import DTYPES, empty, fits, flat, kernel, keys, run

_MOST = 256  # levels of a code of one byte


@kernel("CPU")
def quantize_codebook(
    x: Tensor, levels: Tensor, block_size: int, stochastic: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """Finite float32, bfloat16, float16; levels of float32."""
    n, count = x.numel(), levels.numel()
    if flat(x) and flat(levels, torch.float32) and 2 <= count <= _MOST and block_size >= 1:
        codes = empty((n,), torch.uint8, x.device)
        scales = empty(((n + block_size - 1) // block_size,), torch.float32, x.device)
        noise = keys(seed) if stochastic else None
        where = (DTYPES[x.dtype], n, levels, count, block_size, noise, codes, scales)
        if run("ck_quantize_codebook", x, *where) == 0:
            return codes, scales
    return reference.quantize_codebook(x, levels, block_size, stochastic, seed)


@kernel("CPU")
def dequantize_codebook(codes: Tensor, levels: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """256 levels."""
    out = _look_up(codes, levels, scales, block_size) if block_size >= 1 else None
    return reference.dequantize_codebook(codes, levels, scales, block_size) if out is None else out


@kernel("CPU")
def quantize_natural(x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Magnitudes up to 2^127 of float32, bfloat16, float16."""
    if flat(x):
        codes = empty((x.numel(),), torch.uint8, x.device)
        top = empty((1,), torch.float32, x.device)
        if run("ck_quantize_natural", x, DTYPES[x.dtype], x.numel(), keys(seed), codes, top) == 0:
            return codes, top
    return reference.quantize_natural(x, seed)


@kernel("CPU")
def dequantize_natural(codes: Tensor, top: Tensor, dtype: torch.dtype) -> Tensor:
    """float32."""
    if dtype == torch.float32:
        table = reference.natural_table(dtype, codes.device)
        out = _look_up(codes, table, top, max(codes.numel(), 1))
        if out is not None:
            return out
    return reference.dequantize_natural(codes, top, dtype)


def _look_up(codes: Tensor, levels: Tensor, scales: Tensor, block_size: int) -> Tensor | None:
    n, device = codes.numel(), codes.device
    blocks = max((n + block_size - 1) // block_size, 1)
    if not (
        flat(codes, torch.uint8)
        and fits(levels, _MOST, torch.float32, device)
        and fits(scales, blocks, torch.float32, device)
    ):
        return None
    out = empty((n,), torch.float32, device)
    run("ck_look_up", out, n, codes, levels, scales, block_size)
    return out

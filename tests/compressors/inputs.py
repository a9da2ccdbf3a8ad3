"""A tensor, its context, and what a peer decodes."""

from __future__ import annotations

import torch

from commkit.types import Compressor, TensorCtx


def sample(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)


def ctx_of(x: torch.Tensor, key: str = "w", step: int = 0, seed: int = 0) -> TensorCtx:
    return TensorCtx(key, x.shape, x.dtype, x.device, step, seed)


def transmit(compressor: Compressor, x: torch.Tensor, salt: int = 0, **at: int) -> torch.Tensor:
    ctx = ctx_of(x, **at)
    return compressor.decompress(compressor.compress(x, ctx, salt), ctx)

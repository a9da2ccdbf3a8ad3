"""Which compressors the contract is checked on: every registered one, some in several settings.

A new compressor is taken up by its name alone. A case here adds what its class claims beyond that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from commkit import registry
from commkit.compressors import E3M0, QSGD
from commkit.types import Compressor, TensorCtx

Bound = Callable[[torch.Tensor], float]


@dataclass(frozen=True)
class CompressorCase:
    """A compressor's settings and claims.

    Args:
        salted: different salts round differently.
        unbiased: the mean over steps and salts is the input.
        contraction: upper bound of |x - C(x)|^2 / |x|^2 (its mean, if C draws at random).
        error: upper bound of |x - C(x)| / max|x|, element by element.
        magnitudes: what is decoded grows with the input. A vote says +1 or -1, of zeros too.
        averaged: ``combine`` is the mean over all ranks, the default of every compressor.
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    salted: bool = False
    unbiased: bool = False
    contraction: Bound | None = None
    error: float | None = None
    magnitudes: bool = True
    averaged: bool = True

    def build(self) -> Compressor:
        return registry.lookup("compressor", self.name)(**self.fields)

    def __str__(self) -> str:
        return "-".join([self.name, *(str(v) for v in self.fields.values())])


def _kept(density: float) -> Bound:
    """Of n elements at least density * n are sent exactly, and no worse than average ones."""
    return lambda x: 1 - density


def _l1(x: torch.Tensor) -> float:
    """mean|x| is the best scale: what it leaves is |x|_2^2 - |x|_1^2 / n, exactly."""
    return 1 - float(x.abs().sum() ** 2 / (x.numel() * x.square().sum()))


def _variance(case: Mapping[str, Any]) -> Bound:
    """QSGD's own bound."""
    return lambda x: QSGD(**case).variance_bound


_CASES = [
    CompressorCase("none", error=0.0),
    CompressorCase("cast", {"dtype": "bf16"}, error=2**-8),
    CompressorCase("cast", {"dtype": "fp16"}, error=2**-11),
    CompressorCase("block_quantize", {"bits": 8}, salted=True, unbiased=True, error=1.001 / 127),
    CompressorCase(
        "block_quantize", {"bits": 4, "block_size": 64}, salted=True, unbiased=True, error=1.001 / 7
    ),
    CompressorCase(
        "block_quantize",
        {"bits": 8, "rounding": "nearest"},
        error=0.501 / 127,
        contraction=_kept(0),
    ),
    CompressorCase(
        "block_quantize",
        {"bits": 4, "rounding": "nearest", "block_size": 128},
        error=0.501 / 7,
        contraction=_kept(0),
    ),
    CompressorCase("qsgd", salted=True, unbiased=True, error=1.001 * 512**0.5 / 7),
    CompressorCase(
        "qsgd",
        {"bits": 8},
        salted=True,
        unbiased=True,
        error=1.001 * 512**0.5 / 127,
        contraction=_variance({"bits": 8}),
    ),
    CompressorCase(
        "qsgd",
        {"bits": 4, "norm": "max", "bucket_size": 64, "levels": 5},
        salted=True,
        unbiased=True,
        error=1.001 / 5,
        contraction=_variance({"bits": 4, "norm": "max", "bucket_size": 64, "levels": 5}),
    ),
    CompressorCase(
        "qsgd",
        {"bits": 2, "norm": "max", "bucket_size": 64},
        salted=True,
        unbiased=True,
        error=1.0,
    ),
    # the widest cell is 0.9 / 64; scales are up to 1.007 times the largest
    CompressorCase("dynamic8", salted=True, unbiased=True, error=1.008 * 0.9 / 64),
    CompressorCase(
        "dynamic8",
        {"block_size": 100, "rounding": "nearest"},
        error=1.008 * 0.45 / 64,
        contraction=_kept(0),
    ),
    # half of the widest gap, between 1/2 and 1
    CompressorCase("e3m0", error=0.2501, contraction=_kept(0)),
    CompressorCase(
        "e3m0",
        {"block_size": 64, "rounding": "stochastic"},
        salted=True,
        unbiased=True,
        error=0.5001,
        contraction=lambda x: E3M0(64, "stochastic").variance_bound,
    ),
    # a range is at most twice the largest
    CompressorCase("min_max", salted=True, unbiased=True, error=2.001 / 255),
    CompressorCase(
        "min_max",
        {"bits": 4, "bucket_size": 64, "rounding": "shift"},
        salted=True,
        unbiased=True,
        error=1.001 / 15,
    ),
    CompressorCase("min_max", {"bits": 2}, salted=True, unbiased=True, error=2.001 / 3),
    CompressorCase("min_max", {"rounding": "nearest"}, error=1.001 / 255, contraction=_kept(0)),
    # an uneven step may be as wide as the range
    CompressorCase("learned_levels", salted=True, unbiased=True, error=2.001),
    CompressorCase("learned_levels", {"rounding": "nearest"}, error=1.001, contraction=_kept(0)),
    CompressorCase("natural", salted=True, unbiased=True, error=1.0, contraction=lambda x: 1 / 8),
    CompressorCase("vote", magnitudes=False),
    CompressorCase("sign", {"scale": "l1"}, contraction=_l1),
    CompressorCase("sign", {"scale": "rms"}),
    CompressorCase("ternary", {"clip": 0.0}, salted=True, unbiased=True, error=1.0),
    CompressorCase("ternary", {"clip": 2.5}, salted=True),
    CompressorCase("topk", {"density": 0.01}, contraction=_kept(0.01)),
    CompressorCase(
        "topk", {"density": 0.1, "threshold": "sampled", "values": "fp32"}, contraction=_kept(0.1)
    ),
    CompressorCase("topk", {"density": 0.2, "values": "bf16"}, contraction=_kept(0.19)),
    CompressorCase("topk", {"density": 0.2, "values": "fp16"}, contraction=_kept(0.19)),
    CompressorCase("topk", {"density": 1.0}, error=0.0),
    CompressorCase("topk", {"density": 0.01, "warmup_steps": 8}, contraction=_kept(0.01)),
    # 4000 elements are tiles of 50
    CompressorCase(
        "dct_topk", {"top_k": 5, "values": "fp32"}, contraction=_kept(0.1), averaged=False
    ),
    CompressorCase("dct_topk", {"top_k": 8}, contraction=_kept(0.159), averaged=False),
    CompressorCase("dct_topk", {"top_k": 50, "values": "fp32"}, error=0.0),  # would not shrink
    CompressorCase("randomk", {"density": 0.1}, contraction=_kept(0.09)),
    CompressorCase("randomk", {"density": 0.1, "unbiased": True}, unbiased=True),
]
_named = {case.name for case in _CASES}
CASES = _CASES + [CompressorCase(n) for n in registry.names("compressor") if n not in _named]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHAPES = ((), (0,), (3, 0), (1,), (7,), (4097,), (64, 48), (8, 4, 3, 3))


def ctx_of(x: torch.Tensor, key: str = "layer.weight", step: int = 0, seed: int = 0) -> TensorCtx:
    return TensorCtx(key, x.shape, x.dtype, x.device, step, seed)


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0):
    """Gaussian values; magnitudes that no dtype has trouble with."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def transmit(compressor: Compressor, x: torch.Tensor, salt: int = 0, step: int = 0) -> torch.Tensor:
    """What a peer decodes."""
    ctx = ctx_of(x, step=step)
    return compressor.decompress(compressor.compress(x, ctx, salt), ctx)

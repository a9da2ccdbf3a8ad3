"""The largest elements and where they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ..registry import register
from ..types import Compressor, Payload, TensorCtx

_VALUES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_EXACT_UP_TO = 1 << 15
_LOWER, _TRIES = 0.8, 10
_STAGES = 4  # of the warm-up: 25 %, 6.25 %, 1.56 %, 0.39 %


@register("compressor", "topk")
@dataclass(frozen=True, slots=True)
class TopK(Compressor):
    """Exactly ``k = max(1, ceil(density * n))`` elements of largest magnitude, as (int32 index, value)
    pairs (Lin et al. 2018). Biased: use error feedback.

    Args:
        density: share of elements sent, in (0, 1]; 0.001 sends 8 bytes per thousand elements.
        threshold: "exact" sorts all; "sampled" estimates the k-th magnitude from 1 % of the tensor, selects
            everything above it and sorts only that (fewer than k selected: the threshold is lowered by 0.8
            and tried again), which finds the same elements; "auto" sorts up to 2^15 elements and samples
            above. Cut by magnitude and never by position.
        values: "fp32", or "bf16"/"fp16" to send 6 bytes per element; feedback keeps the rounding error.
        warmup_steps: over the first so many steps of the run the density comes down in four stages of
            equal length: 25 %, 6.25 %, 1.56 % and 0.39 %, but never below ``density`` (Lin et al. 2018,
            section 3.3). Four epochs suit; ramp the learning rate in the same steps.

    Raises:
        ValueError: density outside (0, 1], an unknown threshold or values, or negative warmup_steps.
    """

    density: float = 0.001
    threshold: Literal["auto", "exact", "sampled"] = "auto"
    values: Literal["fp32", "bf16", "fp16"] = "fp32"
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density} must be in (0, 1]; use for example 0.001")
        if self.threshold not in ("auto", "exact", "sampled"):
            raise ValueError(f"threshold={self.threshold!r} must be 'auto', 'exact' or 'sampled'")
        if self.values not in _VALUES:
            raise ValueError(f"values={self.values!r} must be 'fp32', 'bf16' or 'fp16'")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be >= 0; use 0 for no warm-up")

    def density_at(self, step: int) -> float:
        """Share of elements sent at ``step``."""
        if step >= self.warmup_steps:
            return self.density
        stage: int = step * _STAGES // self.warmup_steps
        return max(self.density, 0.25 ** (stage + 1))

    def k(self, numel: int, step: int | None = None) -> int:
        """How many elements of a tensor of ``numel`` are sent at ``step``; None: after the warm-up."""
        density = self.density if step is None else self.density_at(step)
        return min(numel, max(1, math.ceil(density * numel)))

    def compress(self, x: Tensor, ctx: TensorCtx, salt: int = 0) -> Payload:
        flat = x.reshape(-1)
        k = self.k(flat.numel(), ctx.step)
        exact_up_to = {"exact": 2**63, "auto": _EXACT_UP_TO, "sampled": 0}[self.threshold]
        exact = flat.numel() <= exact_up_to
        indices = _largest(flat, k) if exact else _largest_sampled(flat, k, ctx.shared_seed())
        index_dtype = torch.int32 if ctx.numel < 2**31 else torch.int64
        return indices.to(index_dtype), flat.index_select(0, indices).to(_VALUES[self.values])

    def decompress(self, payload: Payload, ctx: TensorCtx) -> Tensor:
        return self.combine([payload], ctx)

    def combine(self, payloads: Sequence[Payload], ctx: TensorCtx) -> Tensor:
        out = torch.empty(ctx.numel, dtype=ctx.work_dtype, device=ctx.device)
        self.combine_into(out, payloads, ctx)
        return out.view(ctx.shape)

    def combine_into(self, out: Tensor, payloads: Sequence[Payload], ctx: TensorCtx) -> None:
        out.zero_()
        for indices, values in payloads:
            ops.scatter_accumulate_(out, indices, values.to(ctx.work_dtype) / len(payloads))

    def subtract_(self, x: Tensor, payload: Payload, ctx: TensorCtx) -> None:
        indices, values = payload
        ops.scatter_accumulate_(x, indices, -values.to(ctx.work_dtype))

    def places(self, payload: Payload, ctx: TensorCtx) -> Tensor:
        indices, values = payload
        return indices[values != 0]

    def payload_bytes(self, ctx: TensorCtx) -> int:
        index_bytes = 4 if ctx.numel < 2**31 else 8
        return self.k(ctx.numel, ctx.step) * (index_bytes + _VALUES[self.values].itemsize)


def _largest(flat: Tensor, k: int) -> Tensor:
    return torch.topk(flat.abs(), k, sorted=False).indices


def _largest_sampled(flat: Tensor, k: int, seed: int) -> Tensor:
    # The sample holds at least 64 of the k: two standard deviations more, and the first try nearly always
    # finds enough.
    margin = 2 / math.sqrt(max(64, k // 100))
    threshold = ops.sample_threshold(flat, min(flat.numel(), math.ceil(k * (1 + margin))), seed)
    for _ in range(_TRIES):
        selected = ops.select_at_least(flat, threshold)
        if selected.numel() >= k:
            best = _largest(flat.index_select(0, selected), k)
            return selected.index_select(0, best)
        threshold = threshold * _LOWER
    return _largest(flat, k)

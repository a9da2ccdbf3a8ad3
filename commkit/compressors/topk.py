"""The largest elements and where they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .. import ops
from ..registry import register
from ..types import Compressor, Payload, TensorCtx

_VALUES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What is at most half of the smallest magnitude of a dtype is sent as 0.
_NEGLIGIBLE = {
    name: torch.finfo(dtype).tiny * torch.finfo(dtype).eps / 2 for name, dtype in _VALUES.items()
}
_EXACT_UP_TO = 1 << 15
_STAGES = 4  # of the warm-up: 25 %, 6.25 %, 1.56 %, 0.39 %


@register("compressor", "topk")
@dataclass(frozen=True, slots=True)
class TopK(Compressor):
    """Exactly ``k = max(1, ceil(density * n))`` elements of largest magnitude, as (int32 index, value)
    pairs (Lin et al. 2018). Biased: use error feedback.

    Args:
        density: share of elements sent, in (0, 1]; 0.001 sends 8 bytes per thousand elements.
        threshold: "exact" sorts all; "sampled" estimates the k-th magnitude from 0.1 % of the tensor, selects
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

    shows_nonfinite: ClassVar[bool] = True  # they are the largest of all

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
        if self._samples(ctx.numel):
            return self._payload(*ops.largest(flat, k, ctx.shared_seed()), ctx)
        indices = ops.largest_of_rows(flat.view(1, -1), k)[0]
        return self._payload(indices, flat.index_select(0, indices), ctx)

    def corrects(self, ctx: TensorCtx) -> bool:
        return self._samples(ctx.numel)

    def correct_and_compress(
        self,
        g: Tensor,
        before: tuple[Tensor | None, Tensor | None],
        after: tuple[Tensor, Tensor],
        momentum: float,
        nesterov: bool,
        masking: bool,
        ctx: TensorCtx,
    ) -> Payload:
        velocity, unsent = (None if x is None else x.reshape(-1) for x in before)
        u, v = (x.view(-1) for x in after)
        k, negligible = self.k(ctx.numel, ctx.step), _NEGLIGIBLE[self.values]
        indices, values = ops.dgc_step_(
            *(u, v, g.reshape(-1), velocity, unsent, momentum, nesterov, masking),
            *(negligible, k, ctx.shared_seed()),
        )
        payload = self._payload(indices, values, ctx)
        if payload[1].dtype != values.dtype:  # what rounding keeps back
            ops.scatter_accumulate_(v, indices, values - payload[1].to(values.dtype))
        return payload

    def _samples(self, numel: int) -> bool:
        return (
            numel > (_EXACT_UP_TO if self.threshold == "auto" else 0) and self.threshold != "exact"
        )

    def _payload(self, indices: Tensor, values: Tensor, ctx: TensorCtx) -> Payload:
        index_dtype = torch.int32 if ctx.numel < 2**31 else torch.int64
        return indices.to(index_dtype), values.to(_VALUES[self.values])

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

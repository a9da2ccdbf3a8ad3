"""TernGrad: ternary codes with one scale for all ranks, added up as whole numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..compressors.ternary import clipped, largest
from ..metrics import profiler_range
from ..registry import register
from ..types import Aggregated, Comm, NonFiniteError, Payload, TensorCtx
from .exchange import Exchange
from .health import health
from .sharding import Shard, shards_of
from .stateless import Stateless


@register("aggregator", "terngrad")
@dataclass(slots=True)
class TernGrad(Stateless):
    """``t = sgn(g) Bernoulli(|g| / s)`` in {-1, 0, 1} on every rank, mean = ``s / W * sum of t`` (Wen et al.
    2017, equations 1 to 5, 10 and section 5's scaler sharing: s is the largest of the ranks' ``max|g|``).

    Three collectives per reduction: an all-reduce of all tensors' scales, an all-to-all of codes at 2 bits
    per element to the owners of shards, who add them up exactly, and one of the sums to everybody. Sums lie
    in [-W, W] and travel at the smallest of 2 bits (W = 1), 4 bits (to W = 7), 8 bits (to 127) and int16 that
    holds them. Nothing is rounded a second time, so only the codes are noise: its variance is |g| (s - |g|)
    per element and rank, and falls as 1/W.

    Unbiased up to the clipping: no feedback is needed, and error feedback is refused, on which the code
    diverges. The noise regularises; the paper lowers weight decay and dropout for it.

    Args:
        clip: each rank's values are clamped to this many root mean squares of its tensor (the paper's
            c = 2.5) before the largest is taken, which keeps one outlier from setting the noise of all;
            0 turns clipping off and makes the mean unbiased.
        granule: shards are multiples of this many elements; see two_shot.

    Raises:
        ValueError: a negative clip, or a granule below 8.
    """

    allows_error_feedback: ClassVar[bool] = False
    clip: float = 2.5
    granule: int = 4096

    def __post_init__(self) -> None:
        if not self.clip >= 0:
            raise ValueError(f"clip={self.clip} must be >= 0; use 2.5, or 0 for no clipping")
        if self.granule < 8:
            raise ValueError(f"granule={self.granule} must be >= 8; use for example 4096")

    def aggregate(
        self, xs: Sequence[Tensor], ctxs: Sequence[TensorCtx], comm: Comm
    ) -> list[Aggregated]:
        flats = [
            clipped(x.reshape(-1).to(ctx.work_dtype), self.clip)
            for x, ctx in zip(xs, ctxs, strict=True)
        ]
        scales = _shared_scales(xs, flats, comm)
        world_size = comm.world_size
        shards = [
            s for i, ctx in enumerate(ctxs) for s in shards_of(i, ctx, world_size, self.granule)
        ]
        codes: dict[Shard, Payload] = {}
        with profiler_range("compress"):
            for s in shards:
                part, seed = flats[s.index][s.start : s.end], s.ctx.shared_seed(comm.rank)
                codes[s] = (ops.pack_ternary(ops.ternarize(part, scales[s.index], seed)),)

        healthy = scales.new_zeros(
            ()
        )  # of whole numbers; the gradients were looked at with the scales
        exchange = Exchange(shards, comm)
        received = exchange.to_owners(codes, healthy)
        with profiler_range("serve"):
            answers = [
                _sum([of_rank[number][0] for of_rank in received], s.numel)
                for number, s in enumerate(exchange.served_by(comm.rank))
            ]
        like = {s: (_empty_sum(s.numel, world_size),) for s in shards}
        sums = exchange.to_all(answers, healthy, like)
        return [
            Aggregated(
                partial(
                    _mean, sums, [s for s in shards if s.index == i], scales[i], ctx, world_size
                ),
                partial(_sent, codes, [s for s in shards if s.index == i], scales[i], ctx),
                world_size,
            )
            for i, ctx in enumerate(ctxs)
        ]


def sum_bits(world_size: int) -> int:
    """Bits of a sum of ``world_size`` codes: 2, 4, 8 or 16."""
    return next(bits for bits in (2, 4, 8, 16) if world_size < 2 ** (bits - 1))


def _shared_scales(xs: Sequence[Tensor], flats: Sequence[Tensor], comm: Comm) -> Tensor:
    """The largest ``max|g|`` of any rank, one per tensor.

    Raises:
        NonFiniteError: on every rank, if any rank's tensors or scales are not finite.
    """
    scales = torch.stack([largest(flat) for flat in flats])
    bad = ~health([*xs, scales], scales.device).isfinite()
    # A maximum need not hand NaN on: what is bad is said by a number, and its scales are left out.
    told = torch.cat([torch.where(bad, 0, scales), bad.to(scales.dtype).view(1)])
    comm.all_reduce(told, "max")
    if bool(told[-1] > 0):
        raise NonFiniteError("a rank of this reduction holds inf or NaN")
    return told[:-1]


def _sum(packed: Sequence[Tensor], numel: int) -> Payload:
    """The ranks' codes added up, as they travel."""
    bits = sum_bits(len(packed))
    dtype = torch.int16 if bits == 16 else torch.int8
    total = ops.unpack_ternary(packed[0], numel, dtype)
    for codes in packed[1:]:
        total += ops.unpack_ternary(codes, numel, dtype)
    return (total if bits == 16 else ops.pack_codes(total, bits),)


def _empty_sum(numel: int, world_size: int) -> Tensor:
    """Shape and dtype of what :func:`_sum` gives."""
    bits = sum_bits(world_size)
    if bits == 16:
        return torch.empty(numel, dtype=torch.int16, device="meta")
    return torch.empty(-(-numel * bits // 8), dtype=torch.uint8, device="meta")


def _mean(
    sums: Mapping[Shard, Payload],
    shards: Sequence[Shard],
    scale: Tensor,
    ctx: TensorCtx,
    world_size: int,
) -> Tensor:
    bits = sum_bits(world_size)
    with profiler_range("decompress"):
        parts = [
            sums[s][0].to(ctx.work_dtype)
            if bits == 16
            else ops.unpack_codes(sums[s][0], s.numel, bits, ctx.work_dtype)
            for s in shards
        ]
        return _scaled(parts, scale.to(ctx.work_dtype) / world_size, ctx)


def _sent(
    codes: Mapping[Shard, Payload], shards: Sequence[Shard], scale: Tensor, ctx: TensorCtx
) -> Tensor:
    parts = [ops.unpack_ternary(codes[s][0], s.numel, ctx.work_dtype) for s in shards]
    return _scaled(parts, scale, ctx)


def _scaled(parts: Sequence[Tensor], scale: Tensor, ctx: TensorCtx) -> Tensor:
    none = torch.zeros(0, dtype=ctx.work_dtype, device=ctx.device)
    return torch.cat([none, *parts]).mul_(scale).view(ctx.shape)

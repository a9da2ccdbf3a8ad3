"""Which rank serves which part of a parameter: a function of its name, size and the world size alone,
so that a server's state survives any change of DDP's buckets."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..types import TensorCtx


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """``numel`` consecutive elements of tensor number ``index`` of a reduction, served by ``owner``. Equal to
    itself alone, which makes it a cheap key."""

    index: int
    start: int
    numel: int
    owner: int
    ctx: TensorCtx

    @property
    def end(self) -> int:
        return self.start + self.numel

    def of(self, flat: Tensor) -> Tensor:
        """This shard of its flattened tensor."""
        return flat[self.start : self.end]


@lru_cache(maxsize=1 << 14)
def spans_of(
    key: str, numel: int, world_size: int, granule: int
) -> tuple[tuple[int, int, int], ...]:
    """(start, numel, owner) of at most ``world_size`` shards whose lengths (the last one's excepted) are
    equal multiples of ``granule``. The first owner follows from the name, to spread small tensors."""
    length = max(1, -(-numel // (world_size * granule))) * granule
    first = zlib.crc32(key.encode())
    return tuple(
        (start, min(length, numel - start), (first + number) % world_size)
        for number, start in enumerate(range(0, numel, length))
    )


def shards_of(index: int, ctx: TensorCtx, world_size: int, granule: int) -> list[Shard]:
    """The shards of tensor number ``index`` of a reduction."""
    return [
        Shard(index, start, numel, owner, _part(ctx, start, numel))
        for start, numel, owner in spans_of(ctx.key, ctx.numel, world_size, granule)
    ]


def shard_key(key: str, start: int) -> str:
    """Name of the shard of ``key`` that begins at element ``start``."""
    return f"{key}@{start}"


def _part(ctx: TensorCtx, start: int, numel: int) -> TensorCtx:
    shape = torch.Size([numel])
    return TensorCtx(shard_key(ctx.key, start), shape, ctx.dtype, ctx.device, ctx.step, ctx.seed)

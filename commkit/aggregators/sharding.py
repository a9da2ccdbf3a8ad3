"""Which rank serves which part of a parameter: a function of its name, size and the world size alone,
so that a server's state survives any change of DDP's buckets."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from ..types import TensorCtx


@dataclass(frozen=True, slots=True)
class Shard:
    """``numel`` consecutive elements of tensor number ``index`` of a reduction, served by ``owner``."""

    index: int
    start: int
    numel: int
    owner: int
    ctx: TensorCtx

    @property
    def end(self) -> int:
        return self.start + self.numel


def shards_of(index: int, ctx: TensorCtx, world_size: int, granule: int) -> list[Shard]:
    """Cut a flattened tensor into at most ``world_size`` shards whose lengths (the last one's excepted)
    are equal multiples of ``granule``. The first owner follows from the name, to spread small tensors."""
    length = -(-ctx.numel // (world_size * granule)) * granule
    first = zlib.crc32(ctx.key.encode())
    shards = []
    for number, start in enumerate(range(0, ctx.numel, length)):
        numel = min(length, ctx.numel - start)
        owner = (first + number) % world_size
        shards.append(Shard(index, start, numel, owner, ctx.piece(start, numel)))
    return shards

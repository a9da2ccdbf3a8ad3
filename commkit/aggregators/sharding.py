"""Which rank serves which part of a parameter: a function of its name, size and the world size alone,
so that a server's state survives any change of DDP's buckets."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass

import torch

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


def spans_of(key: str, numel: int, world_size: int, granule: int) -> list[tuple[int, int, int]]:
    """(start, numel, owner) of at most ``world_size`` shards whose lengths (the last one's excepted) are
    equal multiples of ``granule``. The first owner follows from the name, to spread small tensors."""
    length = max(1, -(-numel // (world_size * granule))) * granule
    first = zlib.crc32(key.encode())
    return [
        (start, min(length, numel - start), (first + number) % world_size)
        for number, start in enumerate(range(0, numel, length))
    ]


def shards_of(index: int, ctx: TensorCtx, world_size: int, granule: int) -> list[Shard]:
    """The shards of tensor number ``index`` of a reduction."""
    return [
        Shard(
            index,
            start,
            numel,
            owner,
            dataclasses.replace(ctx, key=shard_key(ctx.key, start), shape=torch.Size([numel])),
        )
        for start, numel, owner in spans_of(ctx.key, ctx.numel, world_size, granule)
    ]


def shard_key(key: str, start: int) -> str:
    """Name of the shard of ``key`` that begins at element ``start``."""
    return f"{key}@{start}"

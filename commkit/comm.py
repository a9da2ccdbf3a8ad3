"""``DistComm``: the only place of the library that calls torch.distributed's collectives.

Each call counts the bytes that it sends and the time that it takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .types import ByteCounter, ReduceOp

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

# torch 2.13 renamed all_gather_into_tensor and warns about the old name; 2.11 knows only that one.
_all_gather_single = cast(
    Callable[..., Any],
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor,
)


def nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def all_reduce_wire_bytes(size: int, world_size: int) -> int:
    """Bytes a rank sends in a ring all-reduce of ``size`` bytes: 2 (W-1)/W size."""
    return 2 * (world_size - 1) * size // world_size


class DistComm:
    """Collectives over one torch.distributed process group, counted.

    With one rank in the group nothing is sent and nothing counted as sent.

    Args:
        group: the process group. It must not be used by another thread at the same time: c10d matches
            collectives by the order in which they are issued.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._rank = dist.get_rank(group)
        self._world_size = dist.get_world_size(group)
        self._bytes = ByteCounter()

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    @property
    def bytes(self) -> ByteCounter:
        return self._bytes

    def all_reduce(self, x: Tensor, op: ReduceOp = "sum") -> Tensor:
        if self._world_size > 1:
            start = time.perf_counter()
            dist.all_reduce(x, op=_OPS[op], group=self.group)
            wire = all_reduce_wire_bytes(nbytes(x), self._world_size)
            self._count("all_reduce", nbytes(x), wire, start)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        if self._world_size == 1:
            return x.unsqueeze(0)
        start = time.perf_counter()
        out = x.new_empty(self._world_size * x.numel())
        _all_gather_single(out, x, group=self.group)
        self._count("all_gather", nbytes(x), (self._world_size - 1) * nbytes(x), start)
        return out.view(self._world_size, -1)

    def all_to_all(
        self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]
    ) -> list[Tensor]:
        if self._world_size == 1:
            return [x]
        start = time.perf_counter()
        out = x.new_empty(sum(recv_sizes))
        dist.all_to_all_single(out, x, list(recv_sizes), list(send_sizes), group=self.group)
        wire = (x.numel() - send_sizes[self._rank]) * x.element_size()
        self._count("all_to_all", nbytes(x), wire, start)
        return list(out.split_with_sizes(list(recv_sizes)))

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        if self._world_size > 1:
            start = time.perf_counter()
            dist.broadcast(x, group_src=src, group=self.group)
            wire = (self._world_size - 1) * nbytes(x) // self._world_size
            self._count("broadcast", nbytes(x), wire, start)
        return x

    def all_gather_object(self, obj: Any) -> list[Any]:
        gathered: list[Any] = [None] * self._world_size
        dist.all_gather_object(gathered, obj, group=self.group)
        return gathered

    def barrier(self) -> None:
        dist.barrier(group=self.group)

    def _count(self, op: str, payload_bytes: int, wire_bytes: int, start: float) -> None:
        self._bytes.add(op, payload_bytes, wire_bytes, time.perf_counter() - start)


def new_group_like(group: dist.ProcessGroup, timeout_s: float) -> dist.ProcessGroup:
    """A private group over the same ranks and backend. Collective over ``group`` alone, not over WORLD."""
    created = dist.new_group(
        ranks=dist.get_process_group_ranks(group),
        timeout=timedelta(seconds=timeout_s),
        backend=dist.get_backend(group),
        use_local_synchronization=True,
    )
    assert isinstance(created, torch.distributed.ProcessGroup)
    return created

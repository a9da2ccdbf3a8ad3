"""Time of each collective by the size of its message, over all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm import DistComm
from ..cost.run import timed
from .report import CollectiveFound, Op
from .sweep import slowest, sweep

_CPU_BYTES = 1024**2  # of the all-reduces whose processor time is taken
_CPU_REPEATS = 4


def _all_to_all(comm: DistComm, x: Tensor) -> None:
    parts = [x.numel() // comm.world_size] * comm.world_size
    comm.all_to_all(x, parts, parts)


def _reduce_scatter(comm: DistComm, x: Tensor) -> None:
    floats = x.view(torch.float32)
    out = floats.new_empty(floats.numel() // comm.world_size)
    comm.reduce_scatter_into(out, floats, dist.ReduceOp.SUM)


_RUN: Mapping[Op, Callable[[DistComm, Tensor], object]] = {
    "all_reduce": lambda comm, x: comm.all_reduce(x.view(torch.float32)),
    "all_gather": lambda comm, x: comm.all_gather(x),
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": lambda comm, x: comm.broadcast(x, src=0),
}


def probe_collectives(
    comm: DistComm, device: torch.device, target_s: float, repeats: int
) -> list[CollectiveFound]:
    """Collective. The same on every rank."""
    return [_probe(op, comm, device, target_s, repeats) for op in _RUN]


def _probe(
    op: Op, comm: DistComm, device: torch.device, target_s: float, repeats: int
) -> CollectiveFound:
    def message(size: int) -> float:
        x = torch.zeros(size, dtype=torch.uint8, device=device)
        comm.barrier()
        return slowest(timed(lambda: _RUN[op](comm, x), device), comm, device)

    # float32 parts for each rank
    swept = sweep(message, comm, device, target_s, repeats, multiple=4 * comm.world_size)
    return CollectiveFound(
        op=op,
        latency_s=swept.latency_s,
        bytes_per_second=swept.bytes_per_second,
        samples=swept.samples,
    )


def send_cpu_s_per_byte(comm: DistComm, device: torch.device) -> float:
    """Processor time that this rank spends on a byte that it sends, of the slowest rank; 0 with a single rank."""
    if comm.world_size == 1:
        return 0.0
    x = torch.zeros(_CPU_BYTES // 4, device=device)
    comm.all_reduce(x)
    sent, start = comm.bytes.wire_bytes, time.process_time()
    for _ in range(_CPU_REPEATS):
        comm.all_reduce(x)
    seconds = time.process_time() - start
    return slowest(seconds / (comm.bytes.wire_bytes - sent), comm, device)

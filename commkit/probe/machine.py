"""Where the ranks are, and what memory they have."""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from ..comm import DistComm
from .report import ClusterFound, MemoryFound

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def nodes_of(comm: DistComm, ranks_per_node: int) -> list[int]:
    """By rank, the number of its node; launchers number the ranks of a node one after another. Collective.

    Raises:
        ValueError: nodes of different sizes.
    """
    told = comm.all_gather_object(ranks_per_node)
    if len(set(told)) > 1 or comm.world_size % ranks_per_node:
        raise ValueError(
            f"ranks_per_node: nodes have {sorted(set(told))} ranks; start equally many on each"
        )
    return [rank // ranks_per_node for rank in range(comm.world_size)]


def probe_cluster(comm: DistComm, nodes: Sequence[int], device: torch.device) -> ClusterFound:
    """Collective."""
    boots = comm.all_gather_object(
        _BOOT.read_text() if _BOOT.exists() else f"node {nodes[comm.rank]}"
    )
    return ClusterFound(
        nodes=len(set(nodes)),
        ranks_per_node=comm.world_size // len(set(nodes)),
        backend=dist.get_backend(comm.group),
        device=device.type,
        threads=torch.get_num_threads(),
        cores=cores(),
        ranks_per_machine=boots.count(boots[comm.rank]),
    )


def cores() -> int:
    """That this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def probe_memory(comm: DistComm, device: torch.device, ranks_per_machine: int) -> MemoryFound:
    """After steps were done: the largest peak and the smallest share of all ranks. Collective."""
    if device.type == "cuda":
        share = torch.cuda.get_device_properties(device).total_memory
        peak = max(1, torch.cuda.max_memory_allocated(device))
    else:
        share = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks_per_machine
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    told = comm.all_gather_object((share, peak))
    return MemoryFound(share=min(s for s, _ in told), peak=max(p for _, p in told))

"""torch's default process group, made anew for each epoch."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from ..comm import require_group


def make(
    store: Store, rank: int, world_size: int, timeout: timedelta | None = None
) -> dist.ProcessGroup:
    """The default group (gloo) of ``world_size`` workers that meet in ``store``. Collective over them.

    Raises:
        RuntimeError: it was not made.
    """
    # torch names a group by a counter of its process, which it sets back when a default group is destroyed but not
    # when one could not be made: whoever failed once would meet the others under another name, and all would wait.
    dist.distributed_c10d._world.group_count = 0
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    return require_group(None)


def destroy() -> None:
    """Destroy the default group, and all others with it, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()

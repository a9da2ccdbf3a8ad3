"""The ranks that a method with local updates joins: what they talk through, and what rules them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch.distributed as dist

from ..comm import DistComm, private_comm, require_group
from ..runtime.agreement import wrapped_in_ddp
from ..runtime.alarm import Alarm, NoAlarm
from ..runtime.wire_checksums import CheckedComm
from ..types import Comm
from .replica import Replica

Ranks: TypeAlias = "dist.ProcessGroup | Comm | None"

_joined = 0


@dataclass(frozen=True, slots=True)
class Joined:
    """
    Args:
        comm: collectives for the training thread.
        private: collectives for the worker.
        alarm: how failures travel.
        shards: collectives for the worker over the ranks that hold one replica together; None where a rank holds
            all of it.
    """

    comm: Comm
    private: Comm
    alarm: Alarm | NoAlarm
    shards: Comm | None = None


def join(
    group: Ranks,
    replica: Replica,
    timeout_s: float,
    *,
    shards: Comm | None = None,
    checksums: bool = False,
    elastic: bool = False,
) -> Joined:
    """Make what the ranks of ``group`` talk through. Collective over it.

    Args:
        group: the ranks; None is the default group. For simulations, a Comm.
        replica: this rank's.
        timeout_s: seconds after which a collective of the worker fails.
        shards: of an earlier call; not made again.
        checksums: payloads of the worker carry checksums.
        elastic: ranks may be lost; whoever sees to that tells of failures.
    """
    global _joined
    if group is not None and not isinstance(group, dist.ProcessGroup):
        everybody = [list(range(group.world_size))]
        return Joined(group, group.split(everybody, "outer"), NoAlarm(), shards)
    _joined += 1
    name = f"outer{_joined}"
    group = require_group(group)
    private: Comm = private_comm(group, timeout_s)
    if checksums:
        private = CheckedComm(private)
    if elastic:
        return Joined(DistComm(group), private, NoAlarm(), shards)
    if replica.shard_group is None:
        return Joined(DistComm(group), private, Alarm(group, name), shards)
    if shards is None:
        shards = private_comm(replica.shard_group, timeout_s)
    # A failure that one shard's group sees concerns them all.
    return Joined(DistComm(group), private, Alarm(require_group(None), name), shards)


def refuse_spanning(group: Ranks, replica: Replica, method: str) -> None:
    """
    Args:
        group: that ``method`` is to join.
        replica: this rank's.
        method: its name, for the message.

    Raises:
        RuntimeError: ``group`` holds several shards of one replica, or several ranks of one DistributedDataParallel.
    """
    if not (group is None or isinstance(group, dist.ProcessGroup)):
        return
    ours = set(dist.get_process_group_ranks(require_group(group)))
    shards = replica.shard_group
    if shards is not None and len(ours & set(dist.get_process_group_ranks(shards))) > 1:
        raise RuntimeError(
            f"process_group holds ranks {sorted(ours)}, several of which hold different shards of one replica; "
            f'give {method} ranks of the same shard: mesh["replicate"].get_group()'
        )
    ddp = wrapped_in_ddp(replica.parameters.values())
    if ddp is None:
        return
    theirs = set(dist.get_process_group_ranks(ddp.process_group))
    if len(ours & theirs) > 1:
        raise RuntimeError(
            f"a DistributedDataParallel around this model averages gradients over ranks {sorted(theirs)} at "
            f"every step, which are to train alone; give {method} the plain module"
        )

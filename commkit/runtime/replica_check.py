"""Whether replicas that should be equal are, by checksums."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..comm import DistComm, require_group
from ..types import Comm
from .shards import local

_Followed: TypeAlias = tuple[
    Callable[[], Mapping[str, Tensor]], Callable[[], Comm], Callable[[], int]
]


class ReplicasDiffer(RuntimeError):
    """Ranks have other bits in what should be equal."""


def check_replicas(
    model: nn.Module | Mapping[str, Tensor],
    process_group: dist.ProcessGroup | Comm | None = None,
) -> None:
    """Compare the parameters of all ranks, bit for bit. Collective; sends 8 bytes per parameter, and reads all of them once.

    Buffers are not compared: those of batch normalisation are every rank's own.

    Args:
        model: whose parameters should be equal, or tensors by name; on all ranks the same names.
        process_group: the ranks; None is the default group.

    Raises:
        ReplicasDiffer: on every rank, naming the first parameter that differs, and the ranks on which it does.
    """
    comm = process_group
    if comm is None or isinstance(comm, dist.ProcessGroup):
        comm = DistComm(require_group(comm))
    named = dict(model.named_parameters()) if isinstance(model, nn.Module) else dict(model)
    if not named:
        return
    device = next(iter(named.values())).device
    own = torch.tensor([checksum(x) for x in named.values()], dtype=torch.int64, device=device)
    told = comm.all_gather(own).cpu()
    different = (told != told[0]).any(0).nonzero().flatten().tolist()
    if not different:
        return
    name, column = list(named)[different[0]], told[:, different[0]].tolist()
    most, _ = Counter(column).most_common(1)[0]
    others = [rank for rank, sum_ in enumerate(column) if sum_ != most]
    raise ReplicasDiffer(
        f"replicas differ in {len(different)} of {len(named)} parameters, first in {name!r} "
        f"{tuple(named[name].shape)}: rank{'s' * (len(others) > 1)} {', '.join(map(str, others))} of {comm.world_size} "
        f"{'has' if len(others) == 1 else 'have'} other bits than rank {column.index(most)}; look for steps that only "
        "some ranks take, and go on from a checkpoint"
    )


class ReplicaCheck:
    """Compares replicas before every ``every``-th step of an optimizer, when nothing of it is done yet; from
    :meth:`follow` on.

    Args:
        every: steps.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._follows: _Followed | None = None

    def follow(
        self,
        tensors: Callable[[], Mapping[str, Tensor]],
        comm: Callable[[], Comm],
        step: Callable[[], int],
    ) -> None:
        """
        Args:
            tensors: give what should be equal on all ranks, by name.
            comm: gives those.
            step: gives the number of the step, equal on all of them.
        """
        self._follows = tensors, comm, step

    def before_step(self, *_: object) -> None:
        """To be registered with the optimizer. Collective.

        Raises:
            ReplicasDiffer: see :func:`check_replicas`.
        """
        if self._follows is None:
            return
        tensors, comm, step = self._follows
        if step() % self._every == 0:
            check_replicas(tensors(), comm())


def checksum(x: Tensor) -> int:
    """CRC-32 of this rank's bits of ``x``."""
    data = local(x.detach()).contiguous().view(-1).view(torch.uint8).cpu().numpy()
    return zlib.crc32(data.tobytes())


def digest(x: Tensor) -> str:
    """Shape and checksum, to compare between ranks."""
    return f"{tuple(x.shape)} {checksum(x):08x}"

"""This rank's part of a sharded tensor, and back."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(x: Tensor) -> Tensor:
    """This rank's shard of ``x``, sharing its memory; ``x`` itself if it is whole."""
    return x.to_local() if isinstance(x, DTensor) else x


def sharded_like(x: Tensor, like: Tensor) -> Tensor:
    """``x`` as a shard of a whole that is cut like ``like``, sharing its memory; ``x`` itself if ``like`` is whole."""
    if not isinstance(like, DTensor) or isinstance(x, DTensor):
        return x
    return DTensor.from_local(
        x,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def cut_like(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of ``whole``, which all ranks hold, cut as ``like`` is. No communication."""
    if not isinstance(like, DTensor):
        return whole
    mesh, places = like.device_mesh, like.placements
    return local(distribute_tensor(whole, mesh, places, src_data_rank=None))

"""Merging two trainers: which, and into what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..structure import flatten, unflatten
from ..types import Comm
from .anchors import Anchors

Pairing: TypeAlias = Literal["worst+worst", "best+worst"]

_SKELETON = "skeleton"


@dataclass(frozen=True, slots=True)
class Merge:
    """One merger, for the record.

    Args:
        round: rounds that were behind.
        survivor: the trainer that goes on; its weights counted ``survivor_batch``.
        freed: the trainer whose workers joined it; its weights counted ``freed_batch``.
    """

    round: int
    survivor: int
    freed: int
    survivor_batch: int
    freed_batch: int


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merger brings; equal on all ranks of the merged trainer.

    Args:
        anchors: by parameter name.
        buffers: by name.
        outer_state: of the survivor's outer optimizer; None if there is no such optimizer.
    """

    anchors: dict[str, Tensor]
    buffers: dict[str, Tensor]
    outer_state: dict[str, Any] | None


def pick_pair(batches: Mapping[int, int], pairing: Pairing) -> tuple[int, int]:
    """(survivor, freed) of at least two trainers, given the batch that each requests. The survivor is
    the one with the larger batch; of equals, the one with the lower number."""
    ranked = sorted(batches, key=lambda trainer: (batches[trainer], trainer))
    pair = (ranked[0], ranked[1] if pairing == "worst+worst" else ranked[-1])
    survivor, freed = sorted(pair, key=lambda trainer: (-batches[trainer], trainer))
    return survivor, freed


def staged_merge(
    anchors: Anchors,
    buffers: Mapping[str, Tensor],
    comm: Comm,
    survivor: int,
    freed: int,
    share: float,
) -> Merged:
    """The two trainers' average; changes nothing yet. Collective over ``comm``, the ranks of both.

    Floating-point values become ``(1 - share) * survivor's + share * freed's``, computed as the survivor's
    plus a part of the difference: identical models stay as they are, bit for bit. Integer buffers are
    the larger of both.

    Args:
        anchors: this rank's.
        buffers: this rank's, by name.
        comm: whose ranks.
        survivor: a rank of ``comm`` of the trainer whose outer optimizer is kept.
        freed: one of the other trainer.
        share: the freed trainer's, in [0, 1].
    """
    floats = {n: b for n, b in buffers.items() if b.is_floating_point()}
    own = {**{f"anchor {n}": v for n, v in anchors.values.items()}, **floats}
    mixed = _mix(own, anchors.device, comm, survivor, freed, share)
    integers: dict[str, Tensor] = {}
    for name, b in buffers.items():
        if name not in floats:
            ends = [comm.broadcast(b.detach().clone(), src) for src in (survivor, freed)]
            integers[name] = torch.maximum(*ends)
    return Merged(
        {n: mixed[f"anchor {n}"] for n in anchors.values},
        {n: mixed[n] for n in floats} | integers,
        _outer_state(anchors, comm, survivor),
    )


def _mix(
    named: Mapping[str, Tensor],
    device: torch.device,
    comm: Comm,
    survivor: int,
    freed: int,
    share: float,
) -> dict[str, Tensor]:
    results: dict[str, Tensor] = {}
    for dtype in dict.fromkeys(x.dtype for x in named.values()):
        same = {n: x.detach() for n, x in named.items() if x.dtype == dtype}
        wide = torch.promote_types(dtype, torch.float32)
        flat = torch.cat([x.reshape(-1).to(device, wide) for x in same.values()])
        kept = comm.broadcast(flat.clone(), survivor)
        kept = kept.lerp_(comm.broadcast(flat, freed), share)
        parts = kept.split_with_sizes([x.numel() for x in same.values()])
        results.update(
            (n, part.view(x.shape)) for (n, x), part in zip(same.items(), parts, strict=True)
        )
    return results


def _outer_state(anchors: Anchors, comm: Comm, survivor: int) -> dict[str, Any] | None:
    if anchors.optimizer is None:
        return None
    own = flatten(anchors.optimizer.state_dict())
    told = comm.all_gather_object(
        (own.pop(_SKELETON).tolist(), {key: (tuple(x.shape), x.dtype) for key, x in own.items()})
    )
    skeleton, layout = told[survivor]
    state = {_SKELETON: torch.tensor(skeleton, dtype=torch.uint8)}
    for key, (shape, dtype) in layout.items():
        mine = own.get(key)
        if comm.rank == survivor and mine is not None:
            sent = mine.to(anchors.device, copy=True)
        else:
            sent = torch.zeros(shape, dtype=dtype, device=anchors.device)
        state[key] = comm.broadcast(sent.contiguous(), survivor)
    loaded: dict[str, Any] = unflatten(state)
    return loaded

"""All ranks' state in one object, for frameworks whose checkpoint is one file that one rank writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from ...checkpoint import CheckpointError, restore_items, shared_state_of
from ...comm import DistComm
from ...reducer import Reducer
from ...runtime.redealing import merge
from ...runtime.shards import local
from ...structure import flatten
from ...types import Resizable, StateDict
from .contents import Contents

_WORLD_SIZE, _REPLICATED, _PER_RANK, _REDUCER = "world_size", "replicated", "per_rank", "reducer"


def gather(contents: Contents, device: torch.device) -> dict[str, Any]:
    """Plain tensors of all ranks on rank 0, which needs the host memory for them; elsewhere their number alone.

    Collective. Ranks send to rank 0 one tensor after another, so that of device memory one is needed at a time.

    Args:
        contents: what to save.
        device: where messages have to be for the backend.
    """
    comm = contents["comm"]
    common = {key: shared_state_of(item) for key, item in contents["replicated"].items()}
    own = {key: item.state_dict() for key, item in contents["per_rank"].items()}
    mine = {
        _PER_RANK: {key: local(x).cpu() for key, x in flatten(own).items()},
        _REDUCER: {key: x.cpu() for key, x in contents["reducer"].state_dict().items()},
    }
    ranks = [
        {part: _from_rank(rank, state, comm, device) for part, state in mine.items()}
        for rank in range(comm.world_size)
    ]
    if comm.rank:
        return {_WORLD_SIZE: comm.world_size}
    together = {key: x.cpu().clone() for key, x in flatten(common).items()}
    return {_WORLD_SIZE: comm.world_size, _REPLICATED: together, "ranks": ranks}


def _from_rank(rank: int, mine: StateDict, comm: DistComm, device: torch.device) -> StateDict:
    """On rank 0 the state of ``rank``."""
    layout = {key: (x.shape, x.dtype) for key, x in mine.items()}
    layout = comm.all_gather_object(layout)[rank]
    if rank == 0:
        return {key: x.clone() for key, x in mine.items()}
    state: StateDict = {}
    for key, (shape, dtype) in layout.items():
        if comm.rank == rank and shape.numel():
            message = mine[key].contiguous().view(-1).view(torch.uint8).to(device)
            lost = comm.exchange({0: message}, {})
        elif comm.rank == 0:
            got = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8, device=device)
            lost = comm.exchange({}, {rank: got}) if shape.numel() else set()
            state[key] = got.cpu().view(dtype).view(shape)
        else:
            continue
        if lost:
            raise CheckpointError(
                f"rank {max(lost)} was lost while state was gathered; nothing is saved"
            )
    return state


def restore(
    contents: Contents, gathered: Mapping[str, Any], on_resize: Literal["mean", "error"]
) -> None:
    """Put what :func:`gather` gave back in place; the rules are those of :func:`commkit.checkpoint.load`. Collective.

    Raises:
        CheckpointError: saved by another number of ranks and ``on_resize`` is "error", or the model is sharded.
    """
    comm, reducer = contents["comm"], contents["reducer"]
    saved_by = gathered[_WORLD_SIZE]
    same = saved_by == comm.world_size
    if not same and (on_resize == "error" or not isinstance(reducer, Reducer)):
        raise CheckpointError(
            f"the checkpoint was saved by {saved_by} ranks and this job has {comm.world_size}; start {saved_by}"
            + (", or use on_resize='mean'" if isinstance(reducer, Reducer) else "")
        )
    restore_items(contents["replicated"], gathered[_REPLICATED])
    ranks = gathered["ranks"]
    if same:
        restore_items(contents["per_rank"], ranks[comm.rank][_PER_RANK])
        state = ranks[comm.rank][_REDUCER]
    else:
        state = merge([each[_REDUCER] for each in ranks])
        for item in contents["replicated"].values():
            if isinstance(item, Resizable):
                item.after_resize()
    reducer.load_state_dict(state)
    comm.barrier()

"""Checkpoints through ``torch.distributed.checkpoint``: plain tensors, and rules for a changed world size.

Residuals belong to a rank and are saved by it under the parameter's name. Loaded at the same world size
they are restored bit for bit. At another one, every rank starts from the mean of the saved residuals,
which conserves what was left unsent in the mean; servers' residuals are put together and dealt anew, and so
are the residuals of nodes, as the mean over the nodes.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from .comm import DistComm
from .reducer import Reducer
from .structure import flatten, unflatten
from .types import NODE, RANK, SHARD, WHOLE, Resizable, StateDict, Stateful

_REDUCER, _REPLICATED, _PER_RANK = "reducer", "replicated", "per_rank"


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete, or not what the caller asked for."""


def save(
    directory: str | Path,
    *,
    replicated: Mapping[str, Stateful],
    per_rank: Mapping[str, Stateful],
    reducer: Reducer,
    comm: DistComm,
) -> None:
    """Write a checkpoint. Collective over ``comm``; the directory appears only when it is complete, and
    takes the place of one of the same name.

    Args:
        directory: where; its parents are created.
        replicated: what is equal on all ranks (model, optimizer, progress); saved once.
        per_rank: what every rank has its own of (random-number state).
        reducer: the scheme's residuals and other state, at a step's end.
        comm: all ranks of the job.
    """
    directory = Path(directory)
    partial = directory.with_name(directory.name + ".partial")
    # On every rank and first: a method with rounds in flight waits for them here, until when a reducer is at work.
    common = {key: _shared_state_of(item) for key, item in replicated.items()}
    own = {key: item.state_dict() for key, item in per_rank.items()}
    state = _prefixed(f"{_PER_RANK}/{_rank(comm.rank)}/", flatten(own))
    state |= _prefixed(f"{_REDUCER}/{_rank(comm.rank)}/", reducer.state_dict())
    if comm.rank == 0:
        state |= _prefixed(f"{_REPLICATED}/", flatten(common))
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    comm.barrier()
    dcp_save(state, checkpoint_id=partial, process_group=comm.group)
    if comm.rank == 0:
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    comm.barrier()


def _shared_state_of(item: Stateful) -> dict[str, Any]:
    """What is equal on all ranks: an optimizer that communicates has residuals besides, saved as the
    reducer's."""
    shared = getattr(item, "shared_state_dict", item.state_dict)
    return cast(dict[str, Any], shared())


def load(
    directory: str | Path,
    *,
    replicated: Mapping[str, Stateful],
    per_rank: Mapping[str, Stateful],
    reducer: Reducer,
    comm: DistComm,
    on_resize: Literal["mean", "error"] = "mean",
) -> None:
    """Restore everything in place from a checkpoint of :func:`save`. Collective over ``comm``.

    Args:
        on_resize: what to do when it was saved by another number of ranks: "mean" starts every rank from
            the mean residual and leaves ``per_rank`` items alone; "error" raises.

    Raises:
        CheckpointError: nothing there, or another world size with ``on_resize="error"``.
    """
    directory = Path(directory)
    metadata = _metadata(directory)
    saved_by = _world_size(metadata)
    same = saved_by == comm.world_size
    if not same and on_resize == "error":
        raise CheckpointError(
            f"{directory} was saved by {saved_by} ranks and this job has {comm.world_size}; start "
            f"{saved_by}, or use on_resize='mean'"
        )
    _restore(replicated, _read(directory, metadata, f"{_REPLICATED}/"))
    if same:
        _restore(per_rank, _read(directory, metadata, f"{_PER_RANK}/{_rank(comm.rank)}/"))
        state = _read(directory, metadata, f"{_REDUCER}/{_rank(comm.rank)}/")
    else:
        state = _merged(directory, metadata, saved_by)
        for item in replicated.values():
            if isinstance(item, Resizable):
                item.after_resize()
    reducer.load_state_dict(state)
    comm.barrier()


def latest(directory: str | Path) -> Path | None:
    """The last complete checkpoint among the sub-directories of ``directory``, by name; None if none."""
    complete = [
        m.parent for m in Path(directory).glob("*/.metadata") if m.parent.suffix != ".partial"
    ]
    return max(complete, default=None, key=lambda path: path.name)


def merge(states: list[StateDict]) -> StateDict:
    """One reducer state that any number of ranks can start from, made of the states of all old ranks.

    ``rank/NAME`` is averaged (absent counts as zero), shards are put together into ``whole/NAME``,
    ``node/NAME`` is averaged over the nodes, each of which has it once, into ``whole/NAME``, and everything
    else is equal on all ranks and taken from the first that has it.
    """
    merged: StateDict = {}
    shards: dict[str, dict[int, Tensor]] = {}
    nodes: dict[str, list[Tensor]] = {}
    for state in states:
        for key, value in state.items():
            if key.startswith(f"{RANK}/"):
                share = value / len(states)
                merged[key] = merged[key] + share if key in merged else share
            elif f"/{SHARD}/" in key:
                name, _, start = key.rpartition("@")
                shards.setdefault(name, {})[int(start)] = value
            elif f"/{NODE}/" in key:
                nodes.setdefault(key.replace(f"/{NODE}/", f"/{WHOLE}/", 1), []).append(value)
            else:
                merged.setdefault(key, value)
    for name, of_nodes in nodes.items():
        merged[name] = torch.stack(of_nodes).mean(0)
    for name, pieces in shards.items():
        end = max(at + piece.numel() for at, piece in pieces.items())
        whole = next(iter(pieces.values())).new_zeros(end)
        for at, piece in pieces.items():
            whole[at : at + piece.numel()] = piece
        merged[name.replace(f"/{SHARD}/", f"/{WHOLE}/", 1)] = whole
    return merged


def _merged(directory: Path, metadata: Metadata, saved_by: int) -> StateDict:
    """The merged state of all old ranks, read tensor by tensor to keep one parameter in memory."""
    prefixes = [f"{_REDUCER}/{_rank(rank)}/" for rank in range(saved_by)]
    names = dict.fromkeys(
        key.removeprefix(prefix).rpartition("@")[0] or key.removeprefix(prefix)
        for prefix in prefixes
        for key in metadata.state_dict_metadata
        if key.startswith(prefix)
    )
    merged: StateDict = {}
    for name in names:
        states = [_read(directory, metadata, prefix, name) for prefix in prefixes]
        merged.update(merge(states))
    return merged


def _read(directory: Path, metadata: Metadata, prefix: str, name: str | None = None) -> StateDict:
    """All tensors saved under ``prefix`` (whose key is ``name`` or a shard of it), keyed without it."""
    state: StateDict = {}
    for key, entry in metadata.state_dict_metadata.items():
        rest = key.removeprefix(prefix)
        wanted = name is None or rest == name or rest.rpartition("@")[0] == name
        if key.startswith(prefix) and wanted and isinstance(entry, TensorStorageMetadata):
            state[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    if state:
        with warnings.catch_warnings():  # it says that it is not distributed, as asked
            warnings.filterwarnings("ignore", message=".*intent is to load in a single process")
            dcp_load(state, checkpoint_id=directory, no_dist=True)
    return {key.removeprefix(prefix): value for key, value in state.items()}


def _metadata(directory: Path) -> Metadata:
    try:
        return FileSystemReader(directory).read_metadata()
    except OSError as error:
        raise CheckpointError(
            f"no complete checkpoint at {str(directory)!r}; give a directory written by "
            "commkit.checkpoint.save"
        ) from error


def _world_size(metadata: Metadata) -> int:
    return len(
        {k.split("/")[1] for k in metadata.state_dict_metadata if k.startswith(f"{_REDUCER}/")}
    )


def _restore(items: Mapping[str, Stateful], tensors: StateDict) -> None:
    if items:
        states = unflatten(tensors)
        for name, item in items.items():
            if name not in states:
                raise CheckpointError(f"the checkpoint has no {name!r}; it has {sorted(states)}")
            item.load_state_dict(states[name])


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {f"{prefix}{key}": value for key, value in state.items()}


def _rank(rank: int) -> str:
    return f"{rank:06d}"

"""Checkpoints through ``torch.distributed.checkpoint``: plain tensors, and rules for a changed world size.

Residuals belong to a rank and are saved by it under the parameter's name. Loaded at the same world size
they are restored bit for bit. At another one, every rank starts from the mean of the saved residuals,
which conserves what was left unsent in the mean; servers' residuals are put together and dealt anew, and so
are the residuals of nodes, as the mean over the nodes.

Sharded models are saved by all ranks together, each its shards, and so are the residuals of shards; loaded over
another mesh, both are cut anew, and residuals averaged over the replicas first.

A checkpoint is there when it is complete, and until then the one that it replaces is. Its files are verified by SHA-256
before anything of them is read, and nothing in them is run: tensors are loaded with ``weights_only``, and metadata may
hold metadata only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .comm import DistComm
from .reducer import Reducer
from .runtime import checkpoint_files as files
from .runtime.checkpoint_files import CheckpointError as CheckpointError
from .runtime.pending_save import PendingSave as PendingSave
from .runtime.plain_metadata import PlainReader
from .runtime.redealing import merge
from .runtime.shards import local, sharded_like
from .sharded.partition import LAYOUT, PartitionState
from .sharded.state import PLACE, Place, ShardedState, place_of
from .structure import flatten, unflatten
from .types import Resizable, StateDict, Stateful

T = TypeVar("T")
SchemeState: TypeAlias = Reducer | ShardedState | PartitionState
_REDUCER, _REPLICATED, _PER_RANK = "reducer", "replicated", "per_rank"


def save(
    directory: str | Path,
    *,
    replicated: Mapping[str, Stateful],
    per_rank: Mapping[str, Stateful],
    reducer: SchemeState,
    comm: DistComm,
) -> None:
    """Write a checkpoint. Collective over ``comm``; the directory appears only when it is complete, and
    takes the place of one of the same name, which is there until then.

    Args:
        directory: where, seen by all ranks; its parents are created.
        replicated: what is equal on all ranks (model, optimizer, progress); saved once.
        per_rank: what every rank has its own of (random-number state).
        reducer: the scheme's residuals and other state, at a step's end.
        comm: all ranks of the job.

    Raises:
        CheckpointError: on every rank, if one could not write; or what an earlier :func:`save_async` over ``comm`` met.
    """
    _finish_earlier(comm)
    _write(Path(directory), lambda: _state_of(replicated, per_rank, reducer, comm.rank), comm)


def save_async(
    directory: str | Path,
    *,
    replicated: Mapping[str, Stateful],
    per_rank: Mapping[str, Stateful],
    reducer: SchemeState,
    comm: DistComm,
) -> PendingSave:
    """As :func:`save`, but training goes on while files are written, of a copy of everything that is made now (in host
    memory; of shards, where they are). Collective over ``comm``; the first call makes a group for the writing
    thread, gloo over the same ranks.

    One at a time: the next :func:`save` or :func:`save_async` over ``comm`` waits for this one and raises what it met.
    Ask the last one for its :meth:`~PendingSave.result` before ``destroy_process_group()``.
    """
    _finish_earlier(comm)

    def snapshot() -> dict[str, Any]:
        state = _state_of(replicated, per_rank, reducer, comm.rank)
        return {key: _copied(x) for key, x in state.items()}

    writers = comm.apart("checkpoint", "gloo")
    copies = _together(comm, snapshot)
    pending = PendingSave(lambda: _write(Path(directory), lambda: copies, writers))
    _earlier[comm] = pending
    return pending


_earlier: WeakKeyDictionary[DistComm, PendingSave] = WeakKeyDictionary()


def _finish_earlier(comm: DistComm) -> None:
    pending = _earlier.pop(comm, None)
    if pending is not None:
        pending.result()


def _state_of(
    replicated: Mapping[str, Stateful],
    per_rank: Mapping[str, Stateful],
    reducer: SchemeState,
    rank: int,
) -> dict[str, Any]:
    """What ``rank`` saves, by its key in the checkpoint."""
    # First: a method with rounds in flight waits for them here, until when a reducer is at work.
    common = {key: shared_state_of(item) for key, item in replicated.items()}
    own = {key: item.state_dict() for key, item in per_rank.items()}
    apart = {
        key: local(x) for key, x in flatten(own).items()
    }  # replicas differ: each rank its shards
    state = _prefixed(f"{_PER_RANK}/{_rank(rank)}/", apart)
    state |= _prefixed(f"{_REDUCER}/{_rank(rank)}/", reducer.state_dict())
    together = flatten(common)
    if rank != 0:  # shards are everybody's to save
        together = {key: x for key, x in together.items() if isinstance(x, DTensor)}
    return state | _prefixed(f"{_REPLICATED}/", together)


def _copied(x: Tensor) -> Tensor:
    return x.detach().clone() if isinstance(x, DTensor) else x.detach().to("cpu", copy=True)


def _write(directory: Path, state_of: Callable[[], dict[str, Any]], writers: DistComm) -> None:
    """Collective over ``writers``."""
    rank = writers.rank

    def begin() -> dict[str, Any]:
        state = state_of()
        if rank == 0:
            files.begin(directory)
        return state

    state, partial = _together(writers, begin), files.partial_of(directory)
    try:
        dcp_save(state, checkpoint_id=partial, process_group=writers.group)
    except CheckpointException as error:  # which is no Exception, and has the stacks of all ranks
        causes = "; ".join(f"rank {r}: {cause[0]!r}" for r, cause in error.failures.items())
        raise CheckpointError(f"{str(directory)!r} could not be written: {causes}") from error
    mine = _together(writers, lambda: files.sums_of(partial, files.written_by(partial, rank)))
    sums = {
        name: each for of_rank in writers.all_gather_object(mine) for name, each in of_rank.items()
    }
    _together(writers, lambda: files.put_in_place(directory, sums) if rank == 0 else None)


def _together(comm: DistComm, action: Callable[[], T]) -> T:
    """What ``action`` returns, when it has succeeded on all ranks of ``comm``. Collective.

    Raises:
        Exception: what it raised here.
        CheckpointError: what it raised on another rank.
    """
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    told = comm.all_gather_object(
        None if failure is None else f"{type(failure).__name__}: {failure}"
    )
    if isinstance(failure, OSError):
        raise CheckpointError(f"rank {comm.rank}: {type(failure).__name__}: {failure}") from failure
    if failure is not None:
        raise failure
    for rank, message in enumerate(told):
        if message is not None:
            raise CheckpointError(f"rank {rank}: {message}")
    return cast(T, result)


def shared_state_of(item: Stateful) -> dict[str, Any]:
    """What is equal on all ranks: an optimizer that communicates has residuals besides, saved as the
    reducer's."""
    shared = getattr(item, "shared_state_dict", item.state_dict)
    return cast(dict[str, Any], shared())


def load(
    directory: str | Path,
    *,
    replicated: Mapping[str, Stateful],
    per_rank: Mapping[str, Stateful],
    reducer: SchemeState,
    comm: DistComm,
    on_resize: Literal["mean", "error"] = "mean",
    verify: bool = True,
) -> None:
    """Restore everything in place from a checkpoint of :func:`save`. Collective over ``comm``.

    Args:
        on_resize: what to do when it was saved by another number of ranks: "mean" starts every rank from
            the mean residual and leaves ``per_rank`` items alone; "error" raises.
        verify: compare all files with the checksums they were written with, before any is read; ranks share the work.

    Raises:
        CheckpointError: nothing there, a damaged file (named, on every rank), or another world size with
            ``on_resize="error"``.
    """
    _finish_earlier(comm)
    directory = files.standing(Path(directory))
    metadata = _metadata(directory, comm, verify)
    saved_by = _world_size(metadata)
    places = _places(directory, metadata, saved_by)
    same = saved_by == comm.world_size and _fits(directory, metadata, places, reducer)
    if not same and on_resize == "error":
        mesh = f" on a mesh of {places[0].replicas} x {places[0].shards}" if places else ""
        raise CheckpointError(
            f"{directory} was saved by {saved_by} ranks{mesh} and this job has {comm.world_size}; start "
            f"{saved_by} in the same way, or use on_resize='mean'"
        )
    sharded = _ShardTemplates(replicated)
    restore_items(replicated, _read(directory, metadata, f"{_REPLICATED}/", like=sharded))
    if same:
        own = _read(directory, metadata, f"{_PER_RANK}/{_rank(comm.rank)}/")
        restore_items(per_rank, _ShardTemplates(per_rank).wrap(own))
        state = _read(directory, metadata, f"{_REDUCER}/{_rank(comm.rank)}/")
    else:
        state = _dealt_anew(directory, metadata, saved_by, places, reducer)
        for item in replicated.values():
            if isinstance(item, Resizable):
                item.after_resize()
    reducer.load_state_dict(state)
    comm.barrier()


def latest(directory: str | Path) -> Path | None:
    """The last complete checkpoint among the sub-directories of ``directory``, by name; None if none."""
    return max(files.complete(Path(directory)), default=None, key=lambda path: path.name)


def _dealt_anew(
    directory: Path,
    metadata: Metadata,
    saved_by: int,
    places: Sequence[Place],
    reducer: SchemeState,
) -> StateDict:
    """What this rank starts from, of what other ranks have saved."""
    if not isinstance(reducer, ShardedState):
        if places:
            raise CheckpointError(
                f"{directory} was saved with a sharded model and this one is not; shard it with fully_shard"
            )
        return _merged(directory, metadata, range(saved_by))
    if not places:
        raise CheckpointError(
            f"{directory} was saved with a model that was not sharded and this one is; load it without fully_shard"
        )
    per_shard = [
        _merged(directory, metadata, [r for r, place in enumerate(places) if place.shard == shard])
        for shard in range(places[0].shards)
    ]
    return reducer.merged(per_shard)


def _places(directory: Path, metadata: Metadata, saved_by: int) -> list[Place]:
    """Where the old ranks were on their mesh, if the model was sharded."""
    states = [
        _read(directory, metadata, f"{_REDUCER}/{_rank(rank)}/", PLACE) for rank in range(saved_by)
    ]
    return [place_of(state) for state in states if state]


def _fits(
    directory: Path, metadata: Metadata, places: Sequence[Place], reducer: SchemeState
) -> bool:
    """Whether as many ranks were on a mesh like this job's."""
    if isinstance(reducer, PartitionState):
        layout = _read(directory, metadata, f"{_REDUCER}/{_rank(0)}/", LAYOUT)
        return bool(layout) and reducer.fits(layout[LAYOUT])
    if not places:
        return not isinstance(reducer, ShardedState)
    own = reducer.place if isinstance(reducer, ShardedState) else None
    return own is not None and (own.replicas, own.shards) == (places[0].replicas, places[0].shards)


class _ShardTemplates:
    """Tensors of which this rank holds shards, by their key in a checkpoint: of models, optimizers and whatever else shows
    them in its state."""

    def __init__(self, items: Mapping[str, Stateful]) -> None:
        self._shown: dict[str, DTensor] = {}
        self._optimizers: dict[str, list[Tensor]] = {}
        for name, item in items.items():
            if isinstance(item, Optimizer):
                self._optimizers[name] = [p for group in item.param_groups for p in group["params"]]
                continue
            for key, x in flatten({name: item.state_dict()}).items():
                if isinstance(x, DTensor):
                    self._shown[key] = x

    def get(self, key: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        """An empty tensor to read ``key`` into: this rank's shard of it, or all of it."""
        like = self._like(key)
        if like is None or like.shape != size:
            return torch.empty(size, dtype=dtype)
        return torch.empty_like(like, dtype=dtype, requires_grad=False)

    def wrap(self, state: StateDict) -> StateDict:
        """``state`` with what this rank has saved of its shards as shards."""
        wrapped = dict(state)
        for key, x in state.items():
            like = self._like(key)
            if like is not None and local(like.detach()).shape == x.shape:
                wrapped[key] = sharded_like(x, like)
        return wrapped

    def _like(self, key: str) -> DTensor | None:
        _, _, path = key.partition(".")
        name, _, rest = path.partition(".state.")
        if rest and name in self._optimizers:  # a moment is cut like its parameter
            p = self._optimizers[name][int(rest.partition(".")[0])]
            return p if isinstance(p, DTensor) else None
        return self._shown.get(key)


def _merged(directory: Path, metadata: Metadata, ranks: Iterable[int]) -> StateDict:
    """The merged state of some old ranks, read tensor by tensor to keep one parameter in memory."""
    prefixes = [f"{_REDUCER}/{_rank(rank)}/" for rank in ranks]
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


def _read(
    directory: Path,
    metadata: Metadata,
    prefix: str,
    name: str | None = None,
    like: _ShardTemplates | None = None,
) -> StateDict:
    """All tensors saved under ``prefix`` (whose key is ``name`` or a shard of it), keyed without it; of those that
    ``like`` knows this rank's shards."""
    state: StateDict = {}
    for key, entry in metadata.state_dict_metadata.items():
        rest = key.removeprefix(prefix)
        wanted = name is None or rest == name or rest.rpartition("@")[0] == name
        if key.startswith(prefix) and wanted and isinstance(entry, TensorStorageMetadata):
            size, dtype = entry.size, entry.properties.dtype
            state[key] = (
                torch.empty(size, dtype=dtype) if like is None else like.get(rest, size, dtype)
            )
    if state:
        with warnings.catch_warnings():  # it says that it is not distributed, as asked
            warnings.filterwarnings("ignore", message=".*intent is to load in a single process")
            try:
                dcp_load(state, storage_reader=PlainReader(directory), no_dist=True)
            except CheckpointException as error:
                causes = "; ".join(repr(cause[0]) for cause in error.failures.values())
                raise CheckpointError(f"{str(directory)!r} cannot be read: {causes}") from error
    return {key.removeprefix(prefix): value for key, value in state.items()}


def _metadata(directory: Path, comm: DistComm, verify: bool) -> Metadata:
    """Ranks that share the work verify the files first, if they are to. Collective."""

    def found() -> None:
        if not (directory / files.METADATA).exists():
            raise CheckpointError(
                f"no complete checkpoint at {str(directory)!r}; give a directory written by "
                "commkit.checkpoint.save"
            )

    def verified() -> None:
        found()
        files.verify(directory, comm.rank, comm.world_size)

    _together(comm, verified if verify else found)
    return PlainReader(directory).read_metadata()


def _world_size(metadata: Metadata) -> int:
    return len(
        {k.split("/")[1] for k in metadata.state_dict_metadata if k.startswith(f"{_REDUCER}/")}
    )


def restore_items(items: Mapping[str, Stateful], tensors: StateDict) -> None:
    """Load each of ``items`` from the flattened states of all.

    Raises:
        CheckpointError: one of them was not saved.
    """
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

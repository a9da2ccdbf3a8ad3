"""All ranks agree on a configuration, or all refuse."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..optim import CommOptimizer
from ..reducer import Reducer
from ..types import Comm
from ..version import __version__

_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def mark_attached(module: nn.Module) -> None:
    """From now on :func:`agree_to_attach` refuses ``module``."""
    _attached.add(module)


def require_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """``group``, or the default group.

    Raises:
        RuntimeError: there is none.
    """
    group = group if group is not None else dist.group.WORLD
    if group is None:
        raise RuntimeError("torch.distributed is not initialised; call init_process_group() first")
    return group


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """What is reduced, by name.

    Raises:
        ValueError: sparse gradients, nothing to train, or several devices.
    """
    for name, child in module.named_modules():
        if getattr(child, "sparse", False) and isinstance(child, nn.Embedding | nn.EmbeddingBag):
            raise ValueError(
                f"module {name!r} has sparse=True; sparse gradients cannot be compressed, "
                "use sparse=False"
            )
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(
            "the model has no parameter with requires_grad=True, so there is nothing to reduce; "
            "unfreeze one"
        )
    devices = {p.device for p in parameters.values()}
    if len(devices) > 1:
        raise ValueError(
            f"parameters are on several devices ({sorted(map(str, devices))}); use one"
        )
    return parameters


def agree_to_attach(
    module: nn.Module,
    comm: Comm,
    make_reducer: Callable[[], Reducer],
    find_parameters: Callable[[], dict[str, nn.Parameter]],
) -> tuple[Reducer, dict[str, nn.Parameter]]:
    """Build what is to be attached; if that fails on any rank, or ranks differ, all raise. Collective.

    Raises:
        RuntimeError: attached before, or another rank was refused, or ranks disagree.
        Exception: whatever the two functions raise.
    """
    error: Exception | None = None
    fingerprint: dict[str, Any] = {}
    try:
        if module in _attached:
            raise RuntimeError(
                "the model is attached already; attach once, or wrap it in a new DDP"
            )
        reducer = make_reducer()
        parameters = find_parameters()
        optimizer = getattr(reducer, "optimizer", None)
        if isinstance(optimizer, CommOptimizer):
            optimizer.bind(parameters, comm)
        fingerprint = {
            "scheme": reducer.spec(),
            "parameters": {name: f"{tuple(p.shape)} {p.dtype}" for name, p in parameters.items()},
            "step": reducer.step,
        }
    except Exception as caught:
        error = caught
    agree(comm, fingerprint, error)
    if isinstance(optimizer, CommOptimizer):
        optimizer.set_up()
    return reducer, parameters


def agree(comm: Comm, fingerprint: Mapping[str, Any], error: Exception | None) -> None:
    """Compare ``fingerprint`` with every rank's. Collective: call it also when this rank has an ``error``.

    Raises:
        Exception: ``error`` itself on the rank that has one.
        RuntimeError: on every other rank then; or on all, naming the first field that differs.
    """
    versions = {"commkit": __version__, "torch": ".".join(torch.__version__.split(".")[:2])}
    mine = {"versions": versions, **fingerprint}
    told = comm.all_gather_object((str(error) if error else None, mine))
    if error is not None:
        raise error
    for rank, (message, _) in enumerate(told):
        if message is not None:
            raise RuntimeError(f"rank {rank} refused to attach: {message}")
    for rank, (_, theirs) in enumerate(told):
        difference = _difference(told[0][1], theirs, "")
        if difference:
            path, first, other = difference
            raise RuntimeError(
                f"ranks disagree on {path}: rank 0 has {first!r}, rank {rank} has {other!r}; give every "
                "rank the same configuration, model and versions"
            )


def _difference(a: Any, b: Any, path: str) -> tuple[str, Any, Any] | None:
    """Dotted path and values of the first difference between two nested structures."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in [*a, *(k for k in b if k not in a)]:
            found = _difference(a.get(key), b.get(key), f"{path}.{key}".lstrip("."))
            if found:
                return found
        # Order matters for parameters: it decides what a bucket holds.
        return (path, list(a), list(b)) if list(a) != list(b) else None
    return None if a == b else (path, a, b)

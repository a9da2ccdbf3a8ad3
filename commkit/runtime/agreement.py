"""All ranks agree on a configuration, or all refuse."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..version import __version__

_HOPS = 3  # parameter, list, attributes, DDP
_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def mark_attached(module: nn.Module) -> None:
    """From now on :func:`refuse_attached` refuses ``module``."""
    _attached.add(module)


def unmark_attached(module: nn.Module) -> None:
    """``module`` may be attached to again."""
    _attached.discard(module)


def refuse_attached(module: nn.Module) -> None:
    """
    Raises:
        RuntimeError: something is attached to ``module`` already.
    """
    if module in _attached:
        raise RuntimeError("the model is attached already; attach once, or wrap it in a new DDP")


def wrapped_in_ddp(parameters: Iterable[nn.Parameter]) -> DistributedDataParallel | None:
    """A DistributedDataParallel that averages the gradients of any of ``parameters``."""
    ours = list(parameters)
    ids = {id(p) for p in ours}
    # DDP keeps a list of them among its attributes. To look through all objects would be simpler, but breaks
    # tuples that other threads are making.
    holders: list[Any] = ours
    for _ in range(_HOPS):
        holders = gc.get_referrers(*holders)
        for thing in holders:
            if issubclass(type(thing), DistributedDataParallel):
                ddp: DistributedDataParallel = thing
                if any(id(p) in ids for p in ddp.parameters()):
                    return ddp
        holders = [thing for thing in holders if type(thing) in (dict, list)]
    return None


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


class Gathers(Protocol):
    """A :class:`~commkit.types.Comm`, or whatever else can ask everybody."""

    def all_gather_object(self, obj: Any) -> list[Any]: ...


def agree(comm: Gathers, fingerprint: Mapping[str, Any], error: Exception | None) -> None:
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

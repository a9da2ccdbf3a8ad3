"""All ranks agree on a configuration, or all refuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..types import Comm
from ..version import __version__


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

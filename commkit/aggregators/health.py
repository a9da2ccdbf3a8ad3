"""Are all values finite? Answered in one pass, and without a host synchronisation on accelerators."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..types import NonFiniteError


def health(tensors: Iterable[Tensor]) -> Tensor:
    """0-d float32: 0 if every value is finite, else NaN. It survives a sum over ranks either way."""
    floats = [x for x in tensors if x.is_floating_point() and x.numel()]
    if not floats:
        return torch.zeros(())
    if floats[0].device.type != "cpu":
        peaks = [torch.linalg.vector_norm(x, float("inf")).float() for x in floats]
        return torch.stack(peaks).sum() * 0
    return torch.zeros(()) if all(map(_is_finite, floats)) else torch.full((), torch.nan)


def require_finite(flags: Tensor) -> None:
    """Raise on any NaN or inf. ``flags`` has the same bits on every rank, so all raise or none."""
    if not bool(flags.isfinite().all()):
        raise NonFiniteError("a rank of this reduction holds inf or NaN")


def require_finite_all(tensors: Iterable[Tensor]) -> None:
    """The same for large tensors that are equal on all ranks."""
    require_finite(health(tensors))


def _is_finite(x: Tensor) -> bool:
    # The 2-norm is the fastest reduction on CPU; it overflows before |x| does, hence the second look.
    if bool(torch.linalg.vector_norm(x).isfinite()):
        return True
    low, high = torch.aminmax(x)
    return bool(low.isfinite()) and bool(high.isfinite())

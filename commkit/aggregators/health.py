"""Are all values finite? Answered in one pass, and without a host synchronisation on accelerators."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..types import NonFiniteError

_SMALL = 256  # elements
_NON_FINITE = "a rank of this reduction holds inf or NaN"


def health(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """0-d float32 on ``device``: 0 if every value is finite, else NaN. Either survives a sum over ranks."""
    floats = _floats(tensors)
    if device.type == "cpu" or not floats:
        return torch.full((), 0.0 if are_finite(floats) else torch.nan, device=device)
    peaks = [torch.linalg.vector_norm(x, float("inf")).float() for x in floats]
    return torch.stack(peaks).sum() * 0


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every value is finite."""
    floats = _floats(tensors)
    if not floats:
        return True
    # The 2-norm is the fastest reduction on CPU; it overflows before |x| does, hence the second look.
    norms = [torch.linalg.vector_norm(x).float() for x in _joined(floats)]
    peak = norms[0] if len(norms) == 1 else torch.stack(norms).sum()
    return math.isfinite(peak) or all(map(_is_finite, floats))


def require_finite(tensors: Iterable[Tensor]) -> None:
    """Raise on any inf or NaN. The tensors have the same bits on every rank, so all raise or none.

    Raises:
        NonFiniteError: there is one.
    """
    if not are_finite(tensors):
        raise NonFiniteError(_NON_FINITE)


def require_unmarked(marks: Iterable[Tensor]) -> None:
    """Raise if any of ``marks``, 0-d uint8, is set. They are the same on every rank, so all raise or none.

    Raises:
        NonFiniteError: there is one.
    """
    if bool(torch.stack(list(marks)).any()):
        raise NonFiniteError(_NON_FINITE)


def _floats(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [x for x in tensors if x.is_floating_point() and x.numel()]


def _joined(xs: list[Tensor]) -> list[Tensor]:
    """The small ones of ``xs`` as one, where they can be: a call for each takes longer than what it does."""
    small = [x for x in xs if x.numel() <= _SMALL]
    first = small[0] if small else xs[0]
    if len(small) < 2 or any((x.dtype, x.device) != (first.dtype, first.device) for x in small):
        return xs
    return [x for x in xs if x.numel() > _SMALL] + [torch.cat([x.reshape(-1) for x in small])]


def _is_finite(x: Tensor) -> bool:
    low, high = torch.aminmax(x)
    return bool(low.isfinite()) and bool(high.isfinite())

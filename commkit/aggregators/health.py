"""Are all values finite? Answered in one pass, and without a host synchronisation on accelerators."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..types import NonFiniteError


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
    norms = torch.stack([torch.linalg.vector_norm(x).float() for x in floats])
    return bool(norms.isfinite().all()) or all(map(_is_finite, floats))


def require_finite(tensors: Iterable[Tensor]) -> None:
    """Raise on any inf or NaN. The tensors have the same bits on every rank, so all raise or none.

    Raises:
        NonFiniteError: there is one.
    """
    if not are_finite(tensors):
        raise NonFiniteError("a rank of this reduction holds inf or NaN")


def _floats(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [x for x in tensors if x.is_floating_point() and x.numel()]


def _is_finite(x: Tensor) -> bool:
    low, high = torch.aminmax(x)
    return bool(low.isfinite()) and bool(high.isfinite())

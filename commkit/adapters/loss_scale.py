"""Gradients of a scaled loss, brought to their true size for the reduction and back.

Residuals and momenta live from step to step, and a GradScaler changes its scale between steps: they are
kept in true units.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class GradScaler(Protocol):
    """What is needed of ``torch.amp.GradScaler``."""

    def get_scale(self) -> float: ...

    def is_enabled(self) -> bool: ...


def scale_of(scaler: GradScaler | None) -> float:
    """By how much gradients are too large now; 1 without a scaler."""
    return scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0


def unscaled(named: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """``named / scale``, in at least float32 unless the scale is 1."""
    if scale == 1.0:
        return dict(named)
    return {k: x.to(torch.promote_types(x.dtype, torch.float32)) / scale for k, x in named.items()}


def write_back(results: Mapping[str, Tensor], named: Mapping[str, Tensor], scale: float) -> None:
    """Put ``scale * results`` into ``named``."""
    for key, result in results.items():
        if scale != 1.0:
            named[key].copy_(result * scale)
        elif result.data_ptr() != named[key].data_ptr():
            named[key].copy_(result)

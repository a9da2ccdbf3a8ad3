"""Gradients by name, and a way to run a reducer on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from commkit.reducer import Reducer
from commkit.sim import ThreadComm, run_threads

Tensors = dict[str, torch.Tensor]


def sample(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def on_ranks(
    world_size: int, make: Callable[[], Reducer], body: Callable[[Reducer, ThreadComm], Any]
) -> list[Any]:
    """``body(reducer, comm)`` with a new reducer on each rank."""
    return run_threads(lambda comm: body(make(), comm), world_size)


def residual(reducer: Reducer, key: str) -> torch.Tensor:
    return reducer.state_dict()[f"rank/{key}"].clone()

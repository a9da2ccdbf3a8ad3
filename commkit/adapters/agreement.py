"""Gradients are reduced by what all ranks agree on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..optim import CommOptimizer
from ..reducer import Reducer
from ..runtime.agreement import agree, refuse_attached
from ..types import Comm


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
    told: dict[str, Any] = {}
    try:
        refuse_attached(module)
        reducer = make_reducer()
        parameters = find_parameters()
        optimizer = getattr(reducer, "optimizer", None)
        if isinstance(optimizer, CommOptimizer):
            optimizer.bind(parameters, comm)
        told = fingerprint(reducer, parameters) | {"step": reducer.step}
    except Exception as caught:
        error = caught
    agree(comm, told, error)
    if isinstance(optimizer, CommOptimizer):
        optimizer.set_up()
    return reducer, parameters


def fingerprint(reducer: Reducer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """What must be equal on all ranks."""
    return {
        "scheme": reducer.spec(),
        "parameters": {name: f"{tuple(p.shape)} {p.dtype}" for name, p in parameters.items()},
    }

"""Plain modules: gradients are reduced when the optimizer steps.

For models that no wrapper reduces: on any backend, with any number of backward passes before the step.
Nothing of the communication is hidden behind backward.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ..comm import DistComm, new_group_like, require_group
from ..metrics import StepStats
from ..reducer import Reducer
from ..runtime.agreement import (
    mark_attached,
    trainable_parameters,
    wrapped_in_ddp,
)
from ..runtime.meter import StepMeter
from .agreement import agree_to_attach
from .kept import KeepsState
from .loss_scale import write_back


class StepHandle(KeepsState[Reducer]):
    """An attachment to an optimizer's step. Attributes and methods are those of
    :class:`~commkit.Handle`."""

    def __init__(
        self,
        reducer: Reducer,
        parameters: dict[str, nn.Parameter],
        optimizer: Optimizer,
        group: dist.ProcessGroup,
        timeout_s: float,
    ) -> None:
        self.reducer = reducer
        self.comm = DistComm(group)
        self._private_comm = DistComm(new_group_like(group, timeout_s), timeout_s)
        reducer.prepare(parameters, self._private_comm)
        self._parameters = parameters
        self._meter = StepMeter(self._private_comm)
        self._last_step = StepStats()
        self._registration = optimizer.register_step_pre_hook(self._reduce)

    @property
    def last_step(self) -> StepStats:
        return dataclasses.replace(self._last_step, residual_norm=self.reducer.residual_norm)

    def close(self) -> None:
        """Steps reduce nothing from now on."""
        self._registration.remove()

    @torch.no_grad()
    def _reduce(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        given = (arg for arg in (*args, *kwargs.values()) if arg is not optimizer)
        if any(arg is not None for arg in given):  # torch hands `self` over with the arguments
            raise RuntimeError(
                "gradients are reduced before the step, and a closure computes them inside it; call "
                "backward first and step() without a closure"
            )
        start = time.perf_counter()
        for p in self._parameters.values():
            if p.grad is None:  # a rank that skips a collective would hang the others
                p.grad = torch.zeros_like(p)
        named = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        write_back(self.reducer.reduce(dict(named), self._private_comm), named, 1.0)
        seconds = time.perf_counter() - start
        self._meter.add(seconds)
        self._last_step = self._meter.close(self.reducer.end_step(), exposed=seconds)


def attach_at_step(
    model: nn.Module,
    make: Callable[[], Reducer],
    optimizer: Optimizer,
    process_group: dist.ProcessGroup | None,
    timeout_s: float,
    stepped: Callable[[], dict[str, nn.Parameter]] | None = None,
) -> StepHandle:
    """See :func:`commkit.attach`. ``stepped`` finds what the optimizer steps by parameter name, where that is not
    the model's parameters."""
    group = require_group(process_group)

    def parameters() -> dict[str, nn.Parameter]:
        found = trainable_parameters(model)
        # It would average gradients before they are reduced here: everything would be sent twice, once in full.
        if wrapped_in_ddp(found.values()) is not None:
            raise RuntimeError(
                "a DistributedDataParallel around this model all-reduces its gradients already; attach "
                "to the DDP module, commkit.attach(ddp_model, ...), or do not wrap the model"
            )
        return found

    reducer, found = agree_to_attach(
        model, DistComm(group), make, parameters if stepped is None else stepped
    )
    handle = StepHandle(reducer, found, optimizer, group, timeout_s)
    mark_attached(model)
    return handle

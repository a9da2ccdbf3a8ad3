"""Plain modules: gradients are reduced when the optimizer steps.

For models that no wrapper reduces: on any backend, with any number of backward passes before the step.
Nothing of the communication is hidden behind backward.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..aggregators import Hierarchical
from ..comm import DistComm, private_comm, require_group
from ..membership import Elastic
from ..metrics import StepStats
from ..optim import CommOptimizer
from ..reducer import Reducer
from ..runtime.agreement import (
    agree,
    mark_attached,
    refuse_attached,
    trainable_parameters,
    wrapped_in_ddp,
)
from ..runtime.meter import StepMeter
from ..runtime.redealing import dealt_again, for_everybody
from ..runtime.wire_checksums import CheckedComm
from ..types import Comm, StateDict
from .agreement import agree_to_attach, fingerprint
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
        members: Elastic | None = None,
        wire_checksums: bool = False,
    ) -> None:
        self.reducer = reducer
        self._parameters = parameters
        self._timeout_s = timeout_s
        self._members = members
        self._wire_checksums = wire_checksums
        self._last_step = StepStats()
        self.comm = self._comm_of(group)
        if members is None:  # which call rebuild() when the loop begins
            self._connect(group)
        self._registration = optimizer.register_step_pre_hook(self._reduce)
        if members is not None:
            members.add(self)

    @staticmethod
    def _default_group() -> dist.ProcessGroup:
        return require_group(None)

    def _comm_of(self, group: dist.ProcessGroup) -> DistComm:
        """Collectives for whoever trains."""
        return DistComm(group)

    def _private_comm_of(self, group: dist.ProcessGroup) -> Comm:
        """Collectives for reductions alone."""
        return private_comm(group, self._timeout_s)

    def _connect(self, group: dist.ProcessGroup) -> None:
        """Reduce over ``group`` from now on. Collective."""
        self.comm = self._comm_of(group)
        private = self._private_comm_of(group)
        self._private_comm: Comm = CheckedComm(private) if self._wire_checksums else private
        if self._members is not None:
            dealt_again(self.reducer, self._parameters, self.comm)
        self.reducer.prepare(self._parameters, self._private_comm)
        self._meter = StepMeter(self._private_comm)

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
        if self._members is not None:
            self._members.require_together()
        write_back(self.reducer.reduce(dict(named), self._private_comm), named, 1.0)
        if self._members is not None:
            self._members.settle(self._private_comm)
        seconds = time.perf_counter() - start
        self._meter.add(seconds)
        self._last_step = self._meter.close(self.reducer.end_step(), exposed=seconds)

    # What a change of the members asks for.

    rounds = False

    def give_up(self) -> None:
        """The step under way is given up: state is that before it, and gradients are gone."""
        self.reducer.abandon()
        for p in self._parameters.values():
            p.grad = None

    def rebuild(self) -> None:
        """Reduce over the default group, which is another one now. Collective over it.

        Raises:
            RuntimeError: its ranks disagree on scheme or model.
        """
        group = self._default_group()
        comm, error = self._comm_of(group), None
        optimizer = getattr(self.reducer, "optimizer", None)
        try:
            if isinstance(optimizer, CommOptimizer):
                optimizer.bind(self._parameters, comm)
        except ValueError as refusal:
            error = refusal
        agree(comm, fingerprint(self.reducer, self._parameters), error)
        if isinstance(optimizer, CommOptimizer):
            optimizer.set_up()
        self._connect(group)

    def catch_up(self) -> bool:
        """Nothing: steps are whole."""
        return False

    def refusal(self, world_size: int) -> str:
        """Nothing: what a scheme asks of the number of workers, its first group has told."""
        return ""

    def shared_state_dict(self) -> StateDict:
        """What a worker that joins gets: all but what a rank has for itself."""
        return for_everybody(self.reducer.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore this rank's state, or begin with what :meth:`shared_state_dict` gave."""
        self.reducer.load_state_dict(dict(state))


def attach_at_step(
    model: nn.Module,
    make: Callable[[], Reducer],
    optimizer: Optimizer,
    process_group: dist.ProcessGroup | None,
    timeout_s: float,
    members: Elastic | None = None,
    stepped: Callable[[], dict[str, nn.Parameter]] | None = None,
    wire_checksums: bool = False,
) -> StepHandle:
    """See :func:`commkit.attach` and :class:`commkit.Debug`. ``stepped`` finds what the optimizer steps by parameter name, where that is not
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

    if members is None:
        reducer, found = agree_to_attach(
            model, DistComm(group), make, parameters if stepped is None else stepped
        )
    else:  # they agree when the loop begins, and again after each loss
        refuse_attached(model)
        reducer, found = make(), parameters()
        if isinstance(reducer.aggregator, Hierarchical):
            raise TypeError(
                "a hierarchical scheme counts on full nodes, which a lost worker leaves behind; with members, use the "
                "scheme without hierarchical"
            )
    handle = StepHandle(reducer, found, optimizer, group, timeout_s, members, wire_checksums)
    mark_attached(model)
    return handle

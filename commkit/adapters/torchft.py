"""torchft: gradients are reduced among whatever replicas its manager counts, and a step that any of them missed is no
step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torchft import Manager
from torchft.optim import OptimizerWrapper
from torchft.process_group import ProcessGroup

from ..aggregators import Hierarchical
from ..comm import CollectiveError, DistComm
from ..metrics import StepStats
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
from ..schemes import Scheme, make_reducer
from .agreement import fingerprint
from .frameworks.versions import TORCHFT
from .loss_scale import write_back

_KEY = "commkit"


class ManagedComm(DistComm):
    """Collectives over a group that torch.distributed has not been told of: one quorum's."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(group)
        self._device = device

    def _device_of_objects(self) -> torch.device:
        return self._device

    def _both_ways(self, x: Tensor) -> bool:
        return False  # torch sends between pairs of groups that it knows alone

    @contextmanager
    def _counted(self, op: str, payload_bytes: int, wire_bytes: int) -> Iterator[None]:
        try:
            with super()._counted(op, payload_bytes, wire_bytes):
                yield
        except ValueError as error:  # torch describes a failure to its log, and finds no such group
            raise CollectiveError(str(error.__context__ or error)) from error


class ManagedOptimizer(OptimizerWrapper):  # type: ignore[misc]
    """``torchft.OptimizerWrapper`` with a scheme: ``zero_grad`` asks for a quorum, ``step`` reduces gradients among its
    replicas, asks whether the step counts, and steps only then.

    A step that does not count leaves no trace: weights, optimizer and residuals are those before it. A replica that heals
    is given what the scheme keeps for all, and begins with an empty residual. Where the number of replicas has changed,
    what they keep as servers (``int4``, ``sign``) is dealt anew, and what a lost one kept counts as zero.

    Attributes:
        reducer: the scheme.
        comm: of the last quorum; None before the first step.
    """

    def __init__(
        self,
        manager: Manager,
        group: ProcessGroup,
        reducer: Reducer,
        parameters: dict[str, nn.Parameter],
        optimizer: Optimizer,
    ) -> None:
        super().__init__(manager, optimizer)
        self.reducer = reducer
        self.comm: ManagedComm | None = None
        self._group = group
        self._parameters = parameters
        self._last_step = StepStats()
        manager.register_state_dict_fn(_KEY, self._receive, self._for_everybody)

    @property
    def last_step(self) -> StepStats:
        """Of the last step that counted."""
        return dataclasses.replace(self._last_step, residual_norm=self.reducer.residual_norm)

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        """Reduce, and step if all replicas have it.

        Raises:
            RuntimeError: there is a closure, or replicas disagree on scheme or model.
        """
        if closure is not None:
            raise RuntimeError(
                "gradients are reduced before the step, and a closure computes them inside it; call backward first and "
                "step() without a closure"
            )
        self.manager.wait_quorum()
        for p in self._parameters.values():
            if p.grad is None:  # a replica that skips a collective would hang the others
                p.grad = torch.zeros_like(p)
        named = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        start = time.perf_counter()
        results: dict[str, Tensor] = {}
        if self.manager.errored() is None:
            try:
                results = dict(self.reducer.reduce(dict(named), self._follow()))
            except CollectiveError as error:
                self.manager.report_error(error)
        seconds = time.perf_counter() - start
        if not self.manager.should_commit():
            self.reducer.abandon()
            return
        write_back(results, named, 1.0)
        self.optim.step()
        self._meter.add(seconds)
        self._last_step = self._meter.close(self.reducer.end_step(), exposed=seconds)

    def _follow(self) -> ManagedComm:
        """Collectives of the present quorum. Collective if it is another one than before."""
        group = self._group.parent
        if self.comm is None or self.comm.group is not group:
            self.comm = None  # until everything is in place
            comm = ManagedComm(group, next(iter(self._parameters.values())).device)
            agree(comm, fingerprint(self.reducer, self._parameters), None)
            dealt_again(self.reducer, self._parameters, comm)
            self.reducer.prepare(self._parameters, comm)
            self.comm, self._meter = comm, StepMeter(comm)
        return self.comm

    def _for_everybody(self) -> dict[str, Tensor]:
        return for_everybody(self.reducer.state_dict())

    def _receive(self, state: dict[str, Tensor]) -> None:
        self.reducer.load_state_dict(state)


def attach(
    manager: Manager,
    group: ProcessGroup,
    model: nn.Module,
    scheme: Scheme,
    optimizer: Optimizer,
    **knobs: Any,
) -> ManagedOptimizer:
    """Reduce the gradients of ``model`` by ``scheme`` among the manager's replicas. Call it before the first step.

    Model and optimizer are registered with the manager by its user, as torchft wants it; the scheme registers itself.

    Args:
        manager: with ``use_async_quorum=False``: its replicas heal before a step, not inside it.
        group: the one that the manager was given, a ``torchft.ProcessGroupGloo`` (for GPUs ``ProcessGroupNCCL``).
        model: a plain module, one process to a replica.
        scheme: one that reduces gradients, as for :func:`commkit.attach`.
        optimizer: any of ``torch.optim``.
        knobs: fields of the scheme.

    Returns:
        What takes the optimizer's place in the loop.

    Raises:
        ConfigError: unknown scheme or field, or a value out of range.
        RuntimeError: a version of torchft outside the range, or the model is attached or in a DDP.
        TypeError: a scheme that does not reduce gradients, or counts on nodes.
        ValueError: an asynchronous quorum.
    """
    TORCHFT.check()
    if manager._use_async_quorum:
        raise ValueError(
            "use_async_quorum=True lets a replica heal while gradients are reduced, to which it contributes zeros; give "
            "Manager(use_async_quorum=False)"
        )
    reducer = make_reducer(scheme, knobs)
    if isinstance(reducer.aggregator, Hierarchical):
        raise TypeError(
            "a hierarchical scheme counts on full nodes, which a lost replica leaves behind; use the scheme without "
            "hierarchical"
        )
    refuse_attached(model)
    parameters = trainable_parameters(model)
    if wrapped_in_ddp(parameters.values()) is not None:
        raise RuntimeError(
            "a DistributedDataParallel around this model averages its gradients already; give the plain module"
        )
    made = ManagedOptimizer(manager, group, reducer, parameters, optimizer)
    mark_attached(model)
    return made

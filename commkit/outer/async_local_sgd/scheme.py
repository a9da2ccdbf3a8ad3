"""Asynchronous local SGD as a scheme: everything but the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..delayed_nesterov import DelayedNesterov, PushRule
from .options import AsyncOptions
from .server import AsyncServer
from .worker import AsyncWorker


@dataclass(frozen=True)
class AsyncScheme:
    """Ranks with different roles, so there are two things to build: :meth:`server` on the ranks in
    ``options.servers``, :meth:`worker` on the others. ``launch/asynchronous`` has loops around both.

    Args:
        options: what both ends agree on.
        rule: what a push does to the weights; each server gets a copy.
    """

    options: AsyncOptions = field(default_factory=AsyncOptions)
    rule: PushRule = field(default_factory=DelayedNesterov)

    def serves(self, rank: int) -> bool:
        return rank in self.options.servers

    def server(
        self, model: nn.Module, process_group: dist.ProcessGroup | None = None
    ) -> AsyncServer:
        """The arguments, and what is raised, are those of :class:`AsyncServer`."""
        rule = copy.deepcopy(self.rule)
        return AsyncServer(model, rule, self.options, process_group=process_group)

    def worker(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        process_group: dist.ProcessGroup | None = None,
        master_weights: Mapping[str, Tensor] | None = None,
    ) -> AsyncWorker:
        """The arguments, and what is raised, are those of :class:`AsyncWorker`."""
        return AsyncWorker(
            model,
            optimizer,
            self.options,
            process_group=process_group,
            master_weights=master_weights,
        )

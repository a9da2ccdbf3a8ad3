"""Private copies of the weights as of the last synchronisation, and the outer optimizer over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..runtime.replica_check import digest
from .replica import Replica

OuterOptimizer: TypeAlias = Callable[[list[Tensor]], Optimizer]
"""Builds a torch optimizer over the anchors it is given, for example ``lambda anchors: torch.optim.SGD(anchors,
lr=0.7, momentum=0.9, nesterov=True)``."""


class Anchors:
    """Full-precision tensors of their own: the inner optimizer's gradients never reach them.

    Args:
        replica: whose weights they copy; call :meth:`read` once those are the same on all ranks.
        make_optimizer: of the outer optimizer; None for methods that do their own arithmetic.
        offload: keep them (and so the outer optimizer's state) in host memory, pinned beside a GPU.
    """

    def __init__(
        self, replica: Replica, make_optimizer: OuterOptimizer | None, offload: bool
    ) -> None:
        self._replica = replica
        self._offload = offload
        self._hosts: dict[
            str, dict[str, Tensor]
        ] = {}  # of what is fetched: its place in host memory
        self._pinned = offload and replica.device.type == "cuda"
        device = torch.device("cpu") if offload else replica.device
        self.values: dict[str, Tensor] = {
            name: torch.empty(
                replica.live(name).shape,
                dtype=torch.promote_types(p.dtype, torch.float32),
                device=device,
                pin_memory=self._pinned,
            )
            for name, p in replica.parameters.items()
        }
        self.read()
        self.optimizer = None
        if make_optimizer is not None:
            self.optimizer = make_optimizer([v.requires_grad_() for v in self.values.values()])

    @property
    def device(self) -> torch.device:
        """Where they are used; offloaded, they live elsewhere."""
        return self._replica.device

    @torch.no_grad()
    def read(self) -> None:
        """Anchor at the weights as they are."""
        for name, value in self.values.items():
            value.copy_(self._replica.live(name))

    def difference(self, name: str) -> Tensor:
        """The pseudo-gradient ``anchor - weight``, (shape of the parameter), on its device. A weight in half
        precision started from the rounded anchor, so it is measured from that."""
        live = self._replica.live(name)
        anchor = self.values[name].detach().to(live.device)
        return anchor.to(live.dtype).to(anchor.dtype) - live.to(anchor.dtype)

    @torch.no_grad()
    def step(self, mean: Mapping[str, Tensor]) -> None:
        """One step of the outer optimizer on the anchors of ``mean``'s names, with that as their gradient."""
        assert self.optimizer is not None
        for name, gradient in mean.items():
            anchor = self.values[name]
            anchor.grad = gradient.to(anchor.device, anchor.dtype)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def write_back(self, names: Iterable[str], keep: float = 0.0) -> None:
        """``weight <- keep * weight + (1 - keep) * anchor``."""
        for name in names:
            self._replica.write(name, self.values[name].detach(), keep)

    def fetch(self, names: Iterable[str]) -> None:
        """Bring offloaded anchors and outer moments of ``names`` to the device that trains, without
        waiting for it, until :meth:`evict`. Not offloaded, they are there."""
        for name in names if self._offload else ():
            if name in self._hosts:
                continue
            value, state = self.values[name], self._moments(name)
            self._hosts[name] = {"": value.data, **state}
            value.data = self._fetched(value.data)
            for key, moment in state.items():
                self._state(name)[key] = self._fetched(moment)

    @property
    def fetched(self) -> tuple[str, ...]:
        """Names of what :meth:`fetch` has brought to the device."""
        return tuple(self._hosts)

    def evict(self) -> None:
        """Bring all that was fetched back to host memory."""
        for name, hosts in self._hosts.items():
            value = self.values[name]
            value.data = hosts[""].copy_(value.data)
            for key, moment in self._moments(name).items():
                host = hosts[key] if key in hosts else self._host_like(moment)
                self._state(name)[key] = host.copy_(moment)
        self._hosts.clear()

    def _fetched(self, x: Tensor) -> Tensor:
        return x.to(self._replica.device, copy=True, non_blocking=True)

    def _host_like(self, x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=self._pinned)

    def _state(self, name: str) -> dict[str, Any]:
        if self.optimizer is None:
            return {}
        state: dict[str, Any] = self.optimizer.state.get(self.values[name], {})
        return state

    def _moments(self, name: str) -> dict[str, Tensor]:
        """The outer optimizer's tensors of the size of the anchor. Its counters stay where they are."""
        shape = self.values[name].shape
        state = self._state(name).items()
        moments = {k: x for k, x in state if isinstance(x, Tensor) and x.shape == shape}
        moments.pop("step", None)
        return moments

    def optimizer_settings(self) -> dict[str, Any] | None:
        """What of the outer optimizer must be equal on all ranks, as plain data."""
        if self.optimizer is None:
            return None
        groups = [
            {k: v for k, v in group.items() if isinstance(v, str | int | float | bool | None)}
            for group in self.optimizer.param_groups
        ]
        return {"name": type(self.optimizer).__name__, "groups": dict(enumerate(groups))}

    def digests(self) -> dict[str, str]:
        """Checksums by parameter."""
        return {name: digest(value) for name, value in self.values.items()}

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"values": {n: v.detach() for n, v in self.values.items()}}
        if self.optimizer is not None:
            state["optimizer"] = self.optimizer.state_dict()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.evict()
        for name, value in self.values.items():
            value.copy_(state["values"][name])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])

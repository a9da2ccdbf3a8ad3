"""SGD for gradients that arrive late: it brakes where gradient and velocity agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..types import Comm
from .base import Parameters
from .settings import check_group

_VELOCITY = "momentum_buffer"


class AdaptiveBrakingSGD(Optimizer):
    """Momentum SGD whose gradients are scaled by their alignment with the velocity (Venigalla et al. 2020).

    ``c = <g, v> / (|g| |v|); v = mu v + (1 - rho c) g; x -= lr v``. A gradient that is D steps old still asks for
    what the velocity has done since, and plain momentum overshoots. Here a gradient along the velocity brakes
    (with rho = 2 it is even subtracted) and one against it counts up to 1 + rho times, which keeps training stable
    with delays of 32 and more. Cosines are taken in float32. It does not communicate: give it
    gradients that are already reduced, or applied late.

    State: the velocity, in at least float32.

    Differences from the paper: weight decay is decoupled (``x -= lr lambda x``), so that the cosine is that of
    the loss's gradient.

    Args:
        params: as for any optimizer; groups may set ``lr`` and ``weight_decay``.
        lr: that of momentum SGD without delay.
        momentum: mu.
        rho: how hard to brake; 2 as in the paper, 0 is momentum SGD. Lower it if the delay is small and progress
            slows down.
        weight_decay: lambda, decoupled.
        nesterov: look ahead with the scaled gradient: ``x -= lr (a g + mu v)``.
        granularity: over what a cosine is taken: "row" (dimension 0, a filter, as in the paper; vectors
            whole), "tensor", or "global", all parameters together.
        comm: the ranks over which every tensor of ``params`` is a shard, as with FSDP; its three sums are then
            added up over them, in one all-reduce. Needs granularity "tensor" or "global". None: tensors are whole.

    Raises:
        ValueError: a value out of range, or ``comm`` with granularity "row".
    """

    def __init__(
        self,
        params: Parameters,
        lr: float,
        momentum: float = 0.9,
        rho: float = 2.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        granularity: Literal["row", "tensor", "global"] = "row",
        comm: Comm | None = None,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must be in [0, 1); 0.9 is usual")
        if not rho >= 0:
            raise ValueError(f"rho={rho} must be >= 0; 2 is the paper's, 0 is momentum SGD")
        if granularity not in ("row", "tensor", "global"):
            raise ValueError(f"granularity={granularity!r} must be 'row', 'tensor' or 'global'")
        if comm is not None and granularity == "row":
            raise ValueError(
                "granularity='row' cannot be had of shards, whose rows are cut anywhere; use 'tensor', or "
                "leave out comm if the shards consist of whole rows"
            )
        if nesterov and not momentum:
            raise ValueError("nesterov=True needs momentum > 0; use for example momentum=0.9")
        self.momentum, self.rho, self.nesterov = momentum, rho, nesterov
        self.granularity, self.comm = granularity, comm
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any optimizer.

        Raises:
            ValueError: the group sets anything but ``lr`` and ``weight_decay``, or a negative one.
        """
        check_group(param_group, self.defaults, type(self).__name__)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update. Parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        used = [
            (p, group, self._work(p.grad), self._velocity(p))
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        scales = self._scales([(g, v) for _, _, g, v in used])
        for (p, group, g, v), scale in zip(used, scales, strict=True):
            braked = g * scale
            v.mul_(self.momentum).add_(braked)
            update = braked.add(v, alpha=self.momentum) if self.nesterov else v
            if group["weight_decay"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update, alpha=-group["lr"])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for any optimizer; the velocity keeps its precision, whatever the parameter's."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        loaded = [p for group in self.param_groups for p in group["params"]]
        for p, i in zip(loaded, saved, strict=True):
            if i in state_dict["state"]:
                velocity = state_dict["state"][i][_VELOCITY]
                self.state[p][_VELOCITY] = velocity.to(p.device, copy=True)

    def _velocity(self, p: Tensor) -> Tensor:
        state: dict[str, Tensor] = self.state[p]
        if _VELOCITY not in state:
            state[_VELOCITY] = torch.zeros_like(p, dtype=_work_dtype(p))
        return state[_VELOCITY]

    def _work(self, gradient: Tensor) -> Tensor:
        return gradient.to(_work_dtype(gradient))

    def _scales(self, pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """``1 - rho cos`` for each (gradient, velocity), in a shape that multiplies the gradient."""
        if not pairs:
            return []
        if self.granularity == "row":
            return [self._braking(_row_sums(g, v)) for g, v in pairs]
        sums = torch.stack([_sums(g, v) for g, v in pairs])  # (tensors, 3)
        if self.granularity == "global":
            sums = sums.sum(dim=0, keepdim=True)
        if self.comm is not None:
            sums = self.comm.all_reduce(sums.contiguous().view(-1)).view(-1, 3)
        return list(self._braking(sums.unbind(dim=1)).expand(len(pairs)).to(pairs[0][0].dtype))

    def _braking(self, sums: tuple[Tensor, ...]) -> Tensor:
        """Of ``<g, v>``, ``|g|^2`` and ``|v|^2``; 1 where g or v is zero."""
        dot, g2, v2 = sums
        norms = g2.sqrt() * v2.sqrt()
        cosine = torch.where(norms > 0, dot / norms.where(norms > 0, torch.ones_like(norms)), 0.0)
        return 1 - self.rho * cosine.clamp(-1, 1)


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _sums(g: Tensor, v: Tensor) -> Tensor:
    """(3,): over the whole tensor."""
    return torch.stack([(g * v).sum(), g.square().sum(), v.square().sum()])


def _row_sums(g: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Over all dimensions but the first, kept as 1; over all of a vector's."""
    if g.ndim < 2:
        return _sums(g, v).unbind()
    dims = tuple(range(1, g.ndim))
    return tuple(x.sum(dim=dims, keepdim=True) for x in (g * v, g.square(), v.square()))

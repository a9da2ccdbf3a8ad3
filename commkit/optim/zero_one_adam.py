"""0/1 Adam."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..aggregators import TwoShot
from ..aggregators.health import are_finite
from ..compressors import Sign
from ..feedback import ErrorFeedback
from ..policy import Policy
from ..types import Comm, StateDict, TensorCtx
from .adam import check_adam
from .base import CommOptimizer, OptimizerReducer, Parameters
from .coordinates import Coordinates
from .zero_one_schedule import ZeroOneSchedule

_LOCAL = ("exp_avg", "update")


@dataclass(frozen=True, slots=True)
class _RefreshPolicy(Policy):
    """Everything is compressed except at refreshes of the variance, which leave residuals alone."""

    schedule: ZeroOneSchedule | None = None

    def compresses(self, ctx: TensorCtx) -> bool:
        assert self.schedule is not None
        return Policy.compresses(self, ctx) and not self.schedule.refreshes(ctx.step)

    def releases(self, ctx: TensorCtx) -> bool:
        return False


class ZeroOneAdam(CommOptimizer):
    """Adam that sends signs from the first step on, and then only now and then (Lu et al. 2022,
    algorithm 1).

    Until ``var_freeze_step``: at a few steps, ever further apart, gradients are averaged densely and refresh
    the variance v; at all others they travel as signs with error feedback; ``m = beta1 m + (1 - beta1) g``,
    ``x = x - lr m / D`` with ``D = sqrt(v) + eps``. From then on ranks step alone, ``u = u + lr m_i``, and
    every H steps send the signs of u: ``x = x_0 - mean(u) / D`` from the last common x_0, and
    ``m = mean(u) / sum(lr)``. H doubles up to ``local_step_clipper``. Residuals start anew at the switch,
    because u is another quantity than the gradient.

    Between synchronisations the ranks' parameters differ a little; they are equal bits after each.
    A rank whose gradient is not finite leaves out its local step. Weight decay is decoupled, and does not
    enter u. Memory: 16 bytes per parameter (m, D, u, x_0; before the switch 12: m, v, D), and residuals of
    4 + 4/W.
    Not for GradScaler (its scale would differ between ranks) nor ZeroRedundancyOptimizer.

    Args:
        params: parameters or groups.
        lr: as for Adam, schedules too.
        betas: in (0, 1).
        eps: added to the root of the variance.
        weight_decay: decoupled.
        var_freeze_step: steps before the variance is frozen: the learning-rate warm-up.
        var_update_scaler: see :class:`~commkit.optim.zero_one_schedule.ZeroOneSchedule`.
        local_step_scaler: likewise.
        local_step_clipper: likewise; 1 synchronises at every step.
        scale: "l1" or "rms", see :class:`~commkit.compressors.Sign`.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        var_freeze_step: int = 1000,
        var_update_scaler: int = 16,
        local_step_scaler: int = 1000,
        local_step_clipper: int = 16,
        scale: Literal["l1", "rms"] = "l1",
    ) -> None:
        check_adam(lr, betas, eps, weight_decay)
        self.schedule = ZeroOneSchedule(
            var_freeze_step, var_update_scaler, local_step_scaler, local_step_clipper
        )
        reducer = OptimizerReducer(
            TwoShot(Sign(scale), server_feedback=ErrorFeedback()),
            ErrorFeedback(),
            _RefreshPolicy(min_numel=0, schedule=self.schedule),
        )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, reducer)
        self._coordinates = Coordinates()
        self._step_sizes: dict[str, float] = {}  # of the updates that were sent in this step

    def is_local(self, step: int) -> bool:
        return self.schedule.is_local(step)

    @torch.no_grad()
    def outgoing(
        self, named: dict[str, Tensor], compressed: Collection[str], comm: Comm
    ) -> dict[str, Tensor]:
        if self.reducer.step < self.schedule.var_freeze_step:
            return named
        self._switch([key for key in named if "update" not in self._state(key)])
        sent: dict[str, Tensor] = {}
        for key, g in named.items():
            state, group = self._state(key), self._groups[key]
            beta1 = group["betas"][0]
            size = _step_size(group, float(state["step"]) + 1)
            self._step_sizes[key] = size
            m, u = state["exp_avg"], state["update"]
            total = g if g.dtype == m.dtype else g.to(m.dtype)
            total.mul_(size * (1 - beta1)).add_(m, alpha=size * beta1).add_(u)
            packed = self._coordinates.pack(key, total)
            if packed is not None:
                sent[key] = packed
        return sent

    def incoming(
        self, results: dict[str, Tensor], named: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return self._coordinates.unpack(results, named)

    def apply(self) -> None:
        step = self.reducer.step - 1  # of the reduction that has just ended
        arrived = {name: self.arrived(name) for name in self._groups}
        local = self.is_local(step)
        bad = local and not are_finite(arrived.values())
        for name, group in self._groups.items():
            p, state = self.value(name), self._state(name)
            state["step"] += 1
            if bad:
                continue
            work = p if p.dtype == state["exp_avg"].dtype else p.to(state["exp_avg"].dtype)
            if step < self.schedule.var_freeze_step:
                refresh = self.schedule.refreshes(step)
                _step_together(work, arrived[name], state, group, refresh)
            elif local:
                _step_alone(work, arrived[name], state, group)
            else:
                _synchronise(work, arrived[name], state, group, self._step_sizes[name])
            if work is not p:
                p.copy_(work)

    def rank_state(self) -> StateDict:
        """Between two synchronisations: each rank's m, u and parameters."""
        own: StateDict = {}
        for name in self._groups:
            state, p = self.state[self._parameters[name]], self.value(name)
            if state.get("lr_sum"):
                own |= {f"{what}::{name}": state[what] for what in _LOCAL}
                own[f"parameter::{name}"] = p
        return own

    def load_rank_state(self, state: StateDict) -> None:
        for key, value in state.items():
            what, _, name = key.partition("::")
            p = self.value(name)
            with torch.no_grad():
                (p if what == "parameter" else self._state(name)[what]).copy_(value)

    def after_load(self) -> None:
        self._coordinates.clear()

    def _switch(self, names: Collection[str]) -> None:
        """Enter the second stage: fix the denominator, start u, drop the gradients' residuals."""
        self.reducer.forget(names)
        for name in names:
            state = self._state(name)
            del state["exp_avg_sq"]
            state["update"] = torch.zeros_like(state["exp_avg"])
            state["anchor"] = self.value(name).to(state["exp_avg"].dtype, copy=True)
            state["lr_sum"], state["kept"] = 0.0, 1.0
        for name in self._groups:
            if name not in self._coordinates and "anchor" in self._state(name):
                self._coordinates.set(name, self._state(name)["denominator"].isfinite())

    def _state(self, name: str) -> dict[str, Any]:
        p: nn.Parameter = self._parameters[name]
        state: dict[str, Any] = self.state[p]
        if not state:
            dtype = torch.promote_types(p.dtype, torch.float32)
            state["step"] = torch.zeros(())
            state["refreshes"] = 0
            for what in ("exp_avg", "exp_avg_sq"):
                state[what] = torch.zeros_like(self.value(name), dtype=dtype)
            state["denominator"] = torch.full_like(state["exp_avg"], torch.inf)
        return state


def _step_size(group: dict[str, Any], step: float) -> float:
    """lr with the bias correction of m."""
    size: float = group["lr"] / (1 - group["betas"][0] ** step)
    return size


def _step_together(
    p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any], refresh: bool
) -> None:
    beta1, beta2 = group["betas"]
    if refresh:
        state["refreshes"] += 1
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        # Corrected by how often v was refreshed: it knows nothing of the steps between.
        corrected = v / (1 - beta2 ** state["refreshes"])
        unseen = v == 0
        state["denominator"] = corrected.sqrt_().add_(group["eps"]).masked_fill_(unseen, torch.inf)
    state["exp_avg"].lerp_(g, 1 - beta1)
    p.mul_(1 - group["lr"] * group["weight_decay"])
    p.addcdiv_(
        state["exp_avg"], state["denominator"], value=-_step_size(group, float(state["step"]))
    )


def _step_alone(p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    size = _step_size(group, float(state["step"]))
    keep = 1 - group["lr"] * group["weight_decay"]
    m = state["exp_avg"].lerp_(g, 1 - group["betas"][0])
    state["update"].add_(m, alpha=size)
    state["lr_sum"] += size
    state["kept"] *= keep
    p.mul_(keep).addcdiv_(m, state["denominator"], value=-size)


def _synchronise(
    p: Tensor, update: Tensor, state: dict[str, Any], group: dict[str, Any], size: float
) -> None:
    total = state["lr_sum"] + size
    if total > 0:  # with lr = 0 nothing was sent, and m stays as it is
        torch.div(update, total, out=state["exp_avg"])
    kept = state["kept"] * (1 - group["lr"] * group["weight_decay"])
    p.copy_(state["anchor"].mul_(kept)).addcdiv_(update, state["denominator"], value=-1.0)
    state["anchor"].copy_(p)
    state["update"].zero_()
    state["lr_sum"], state["kept"] = 0.0, 1.0

"""SGD by Deep Gradient Compression: the momentum is ahead of the sparse messages, not behind them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from torch import Tensor

from ..aggregators import AllGather
from ..clipping import clip_coefficient, mean_norm
from ..compressors import TopK
from ..feedback import MomentumCorrection
from ..policy import Policy
from ..types import Comm
from .base import CommOptimizer, OptimizerReducer, Parameters, in_work_dtype
from .settings import check_group, require_at_least_zero, without_own

_MOMENTUM, _DECAY = "momentum_buffer", "decay_momentum"


class DGCSGD(CommOptimizer):
    """SGD with momentum whose messages are the largest 0.1 % of the accumulated velocity (Lin et al. 2018).

    Each rank: ``u = mu u + g; v = v + u``, sends the largest of v and forgets u and v there. Backward
    leaves the mean of the messages in ``p.grad``, and ``x -= lr (mean + w)`` with ``w = mu w + lambda x``:
    momentum is linear, so weight decay is that of ``torch.optim.SGD`` to the last rounding and costs no
    communication. Biases and norms are all-reduced and follow ordinary momentum. A clipping of ``p.grad``
    would cut messages that are sent once only; use ``clip_norm``.

    State: u and v, 8 bytes per compressed parameter in place of the momentum, and 4 for w if there is weight
    decay; 4 + 4 per dense one. ``torch.distributed.optim.ZeroRedundancyOptimizer`` around it divides w and the dense ones'
    momentum among the ranks, if ``start_step`` is 0; u and v are each rank's own.

    Differences from the paper: weight decay as above, where it is left open; what is clipped is the whole
    local gradient, as in its section 3.2, biases included.

    Args:
        params: as for any optimizer; groups may set ``lr`` and ``weight_decay``.
        lr: that of the dense run. Warm it up over the steps of ``warmup_steps``.
        momentum: mu.
        weight_decay: lambda, the L2 penalty of ``torch.optim.SGD``.
        nesterov: as in ``torch.optim.SGD``.
        density: share of a tensor that is sent in a step. 0.001 for long runs; 0.01 where an element must
            not wait for hundreds of steps (short runs, few ranks).
        warmup_steps: steps from the run's first in which the density comes down from 25 %, see
            :class:`~commkit.compressors.TopK`. About four epochs.
        clip_norm: largest norm of the mean gradient, that of the dense run; each rank clips its own to
            ``clip_norm sqrt(W)`` before it is accumulated, as the mean of W independent ones is shorter by
            that. (The paper's ``clip_norm / sqrt(W)`` is of gradients that are divided by W already, its
            algorithm 1.) For recurrent networks and transformers. 0 is off. It needs the whole gradient, so
            nothing of the communication is hidden behind backward.
        masking: forget u where v was sent, so that old gradients do not push coordinates on that have just
            moved.
        threshold: how the largest are found, see :class:`~commkit.compressors.TopK`.
        values: precision of what is sent; v keeps the rounding error.
        min_numel: smaller tensors stay dense.
        min_ndim: tensors with fewer dimensions stay dense; 2 keeps biases and norms out.
        start_step: dense steps before; their momentum is handed over.
        exclude: shell patterns of names that stay dense.

    Raises:
        ValueError: a value out of range, or density=1: masking would wipe the momentum in every step.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        density: float = 0.001,
        warmup_steps: int = 0,
        clip_norm: float = 0.0,
        masking: bool = True,
        threshold: Literal["auto", "exact", "sampled"] = "auto",
        values: Literal["fp32", "bf16", "fp16"] = "fp32",
        min_numel: int = 1024,
        min_ndim: int = 2,
        start_step: int = 0,
        exclude: Sequence[str] = (),
    ) -> None:
        self._own = {
            "momentum": momentum,
            "nesterov": nesterov,
            "density": density,
            "warmup_steps": warmup_steps,
            "clip_norm": clip_norm,
            "masking": masking,
            "threshold": threshold,
            "values": values,
            "min_numel": min_numel,
            "min_ndim": min_ndim,
            "start_step": start_step,
            "exclude": exclude,
        }
        require_at_least_zero({"clip_norm": clip_norm})
        if density == 1:
            raise ValueError(
                "density=1.0 must be < 1: everything sent loses its momentum, which is plain SGD; use "
                "torch.optim.SGD with scheme 'ddp', or density=0.001"
            )
        if nesterov and not momentum:
            raise ValueError("nesterov=True needs momentum > 0; use for example momentum=0.9")
        if 0 < warmup_steps <= start_step:
            raise ValueError(
                f"warmup_steps={warmup_steps} must be more than start_step={start_step}, as both count "
                "from the first step; raise warmup_steps, or use 0"
            )
        feedback = MomentumCorrection(momentum, nesterov, masking)
        feedback.initial_velocity = self._velocity_of_dense_steps
        reducer = OptimizerReducer(
            AllGather(TopK(density, threshold, values, warmup_steps)),
            feedback,
            Policy(start_step, min_numel, min_ndim, exclude),
        )
        reducer.whole_step = clip_norm > 0
        self.momentum, self.nesterov, self.clip_norm = momentum, nesterov, clip_norm
        self.settings = {"clip_norm": clip_norm}
        # The momentum of dense steps is known to the parameter's owner alone, and all would have to hand it over.
        self.supports_zero = start_step == 0
        self._correction = feedback  # which a hierarchy takes out of the reducer
        self._flushed: set[str] = set()  # dense again, in a message with all that was unsent
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, reducer)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any optimizer.

        Raises:
            ValueError: the group sets anything but ``lr`` and ``weight_decay``, or a negative one.
        """
        param_group = without_own(param_group, self._own)
        check_group(param_group, self.defaults, type(self).__name__)
        super().add_param_group(param_group)

    def outgoing(
        self, named: dict[str, Tensor], compressed: Collection[str], comm: Comm
    ) -> dict[str, Tensor]:
        held = filter(self._correction.holds, named)
        self._flushed.update(key for key in held if key not in compressed)
        if self.clip_norm:
            norm = mean_norm(named, None, self.reducer.shards)
            coefficient = clip_coefficient(norm, self.clip_norm * comm.world_size**0.5)
            if coefficient < 1:
                for x in named.values():
                    x.mul_(coefficient)
        # In half precision the mean of messages would lose what the feedback takes for delivered.
        return in_work_dtype(named, compressed)

    def apply(self) -> None:
        direct, self._flushed = self.reducer.compressed | self._flushed, set()
        for name, group in self._groups.items():
            p, update = self._parameters[name], self.arrived(name)
            if name in direct:
                self._drop(p, _MOMENTUM)  # by now the feedback's
            else:
                update = self._with_momentum(p, _MOMENTUM, update)
            value = self.value(name)
            if group["weight_decay"]:
                decay = value.to(update.dtype) * group["weight_decay"]
                update = update + self._with_momentum(p, _DECAY, decay)
            value.add_(update, alpha=-group["lr"])

    def _with_momentum(self, p: Tensor, name: str, x: Tensor) -> Tensor:
        """What SGD's rule makes of ``x``: the new ``mu u + x``, or Nesterov's ``x + mu u`` with it."""
        if not self.momentum:
            return x
        state: dict[str, Tensor] = self.state[p]
        if name in state:
            state[name].mul_(self.momentum).add_(x)
        else:
            state[name] = x.clone()
        return x.add(state[name], alpha=self.momentum) if self.nesterov else state[name]

    def _drop(self, p: Tensor, name: str) -> None:
        if p in self.state:
            self.state[p].pop(name, None)
            if not self.state[p]:
                del self.state[p]

    def _velocity_of_dense_steps(self, key: str) -> Tensor | None:
        p = self._parameters.get(key)
        if p is None or p not in self.state:
            return None
        buffer: Tensor | None = self.state[p].get(_MOMENTUM)
        # Nesterov's u is mu times SGD's buffer: u' = mu (u + g) where b' = mu b + g.
        return buffer * self.momentum if buffer is not None and self.nesterov else buffer

"""What 1-bit Adam and 1-bit LAMB share: a variance that is frozen, and then momenta sent as signs."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..aggregators import TwoShot
from ..clipping import clip_coefficient, mean_norm, require_norm
from ..compressors import Sign
from ..feedback import ErrorFeedback
from ..policy import Policy
from ..runtime.shards import cut_like, local
from ..types import Comm
from .adam import check_adam
from .base import CommOptimizer, OptimizerReducer, Parameters
from .coordinates import Coordinates
from .freezing import VarianceWatch

FreezeStep: TypeAlias = int | Literal["auto"]
_NEVER = 2**62
_WATCH = "variance_norms"
_FROZEN_AT = "frozen_at"


class OneBitOptimizer(CommOptimizer):
    """Two stages. Warm-up: gradients are averaged densely and the subclass's own optimizer runs. Then the
    variance is frozen, for good, and each rank sends the signs of its momentum
    ``m_i = beta1 m + (1 - beta1) g_i`` with error feedback on both sides of a two-shot all-reduce; what
    arrives is the new momentum m, the same bits everywhere.

    Under DDP the momentum is formed and sent from the hook, bucket by bucket, while backward goes on.
    State: m and v or what it was frozen to, 8 bytes per element, and residuals of 4 + 4/W.
    """

    supports_zero = True
    corrects_bias = True  # of the variance, when it is frozen

    def __init__(
        self,
        params: Parameters,
        defaults: dict[str, Any],
        *,
        freeze_step: FreezeStep,
        warmup_steps: int,
        ratio_threshold: float,
        scale: Literal["l1", "rms"],
        max_grad_norm: float,
        clip: Literal["momentum", "gradient"],
        variance_floor: float,
        min_numel: int,
        exclude: Sequence[str],
    ) -> None:
        _check(defaults, freeze_step, warmup_steps, max_grad_norm, clip, variance_floor)
        start = _NEVER if freeze_step == "auto" else freeze_step
        reducer = OptimizerReducer(
            TwoShot(Sign(scale), server_feedback=ErrorFeedback()),
            ErrorFeedback(),
            Policy(start, min_numel, exclude=exclude),
        )
        reducer.whole_step = max_grad_norm > 0 and clip == "gradient"
        super().__init__(params, defaults, reducer)
        self.param_groups[0].setdefault(_FROZEN_AT, None)
        self.param_groups[0].setdefault(_WATCH, [])
        self._configured_start = start
        self._watch = VarianceWatch(
            round(1 / (1 - self.param_groups[0]["betas"][1])), warmup_steps, ratio_threshold
        )
        self._auto = freeze_step == "auto"
        self._max_grad_norm = max_grad_norm
        self._clip = clip
        self._variance_floor = variance_floor
        self._masks: dict[nn.Parameter, Tensor] = {}
        self._coordinates = Coordinates()
        self._sharded = False
        self._remote: dict[str, Tensor] = {}  # momenta of parameters that other ranks own (ZeRO)
        self._remote_moves: dict[str, Tensor] = {}
        self._beta1: dict[str, float] = {}

    @property
    def frozen(self) -> bool:
        """Whether the variance is frozen and momenta travel compressed."""
        return self.reducer.step >= self.reducer.policy.start_step

    def set_mask(self, parameter: nn.Parameter, mask: Tensor | None) -> None:
        """Coordinates that may move once momenta are compressed.

        Signs cannot say zero, so coordinates that never get a gradient (positions beyond the sequence
        length, pruned weights) must be left out. Those without any gradient in the warm-up are left out
        anyway. Masks are not part of the state; set them again after loading. The residual of the
        parameter starts anew.

        Args:
            mask: 0 or 1, of any dtype, broadcastable to the parameter; equal on all ranks. None removes it.

        Raises:
            ValueError: another shape.
        """
        if mask is None:
            self._masks.pop(parameter, None)
        else:
            try:
                whole = (mask != 0).expand(parameter.shape).to(parameter.device)
            except RuntimeError:
                raise ValueError(
                    f"mask of shape {tuple(mask.shape)} does not fit a parameter of shape "
                    f"{tuple(parameter.shape)}; give one that broadcasts to it"
                ) from None
            self._masks[parameter] = cut_like(whole, parameter)
        names = [name for name, p in self._parameters.items() if p is parameter]
        self.reducer.forget([name for name in names if self._coordinates.drop(name)])

    def set_up(self) -> None:
        super().set_up()
        assert self.comm is not None
        own = {name: group["betas"][0] for name, group in self._groups.items()}
        everyone = self.comm.all_gather_object(own)
        self._sharded = any(len(each) < len(self._parameters) for each in everyone)
        self._beta1 = {name: beta1 for each in everyone for name, beta1 in each.items()}

    @torch.no_grad()
    def outgoing(
        self, named: dict[str, Tensor], compressed: Collection[str], comm: Comm
    ) -> dict[str, Tensor]:
        self._prepare([key for key in compressed if key not in self._coordinates], comm)
        coefficient = 1.0
        if compressed and self.reducer.whole_step:
            norm = mean_norm(named, comm, self.reducer.shards)
            coefficient = clip_coefficient(norm, self._max_grad_norm)
        sent: dict[str, Tensor] = {}
        for key, g in named.items():
            if key not in compressed:
                sent[key] = g if coefficient == 1 else g.mul_(coefficient)
                continue
            beta1 = self._groups[key]["betas"][0] if key in self._groups else self._beta1[key]
            momentum = self._momentum(key)
            if g.dtype == momentum.dtype:
                g.mul_((1 - beta1) * coefficient).add_(momentum, alpha=beta1)
            else:
                g = torch.add(momentum * beta1, g.to(momentum), alpha=(1 - beta1) * coefficient)
            packed = self._coordinates.pack(key, g)
            if packed is not None:
                sent[key] = packed
        return sent

    def incoming(
        self, results: dict[str, Tensor], named: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return self._coordinates.unpack(results, named)

    def apply(self) -> None:
        compressed = self.reducer.compressed
        arrived = {name: self.arrived(name) for name in self._parameters}
        if self._max_grad_norm > 0 and not (compressed and self.reducer.whole_step):
            norm = mean_norm(arrived, None, self.reducer.shards)
            coefficient = clip_coefficient(norm, self._max_grad_norm)
            if coefficient < 1:
                arrived = {name: x * coefficient for name, x in arrived.items()}
        for name, group in self._groups.items():
            p = self.value(name)
            state = self._state(self._parameters[name])
            state["step"] += 1
            work = p if p.dtype == state["exp_avg"].dtype else p.to(state["exp_avg"].dtype)
            if name in compressed:
                self.apply_compressed(work, arrived[name], state, group)
            else:
                self.apply_dense(work, arrived[name], state, group)
            if work is not p:
                p.copy_(work)
        for name, momentum in self._remote.items():
            if name in compressed:
                momentum.copy_(arrived[name])
        if self._auto and not self.frozen:
            self._look_at_variance()

    @abstractmethod
    def apply_dense(
        self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """A step of the warm-up; ``g`` is the mean gradient."""

    @abstractmethod
    def apply_compressed(
        self, p: Tensor, momentum: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """A step of the compressed stage; ``momentum`` is what arrived."""

    def freeze(self, state: dict[str, Any], group: dict[str, Any]) -> None:
        """The last variance becomes the denominator ``sqrt(v / (1 - beta2^T)) + eps``, in its memory.
        Where it is 0 the denominator is infinite: such coordinates do not move."""
        v = state.pop("exp_avg_sq")
        unseen = v == 0
        if self.corrects_bias:
            v.div_(1 - group["betas"][1] ** float(state["step"]))
        if self._variance_floor > 0:
            v.clamp_(min=self._variance_floor * float(v.mean()))
        state["denominator"] = v.sqrt_().add_(group["eps"]).masked_fill_(unseen, torch.inf)

    def after_load(self) -> None:
        group = self.param_groups[0]
        start = self._configured_start if group[_FROZEN_AT] is None else group[_FROZEN_AT]
        self._start_at(start)
        self._watch.norms = [float(x) for x in group[_WATCH]]
        self._coordinates.clear()
        self._remote.clear()

    def _start_at(self, step: int) -> None:
        self.reducer.policy = dataclasses.replace(self.reducer.policy, start_step=step)

    def _state(self, p: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            dtype = torch.promote_types(p.dtype, torch.float32)
            state["step"] = torch.zeros(())
            like = local(p.detach())
            state["exp_avg"] = torch.zeros_like(like, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(like, dtype=dtype)
        return state

    def _momentum(self, key: str) -> Tensor:
        if key in self._groups:
            momentum: Tensor = self._state(self._parameters[key])["exp_avg"]
            return momentum
        return self._remote[key]

    def _prepare(self, keys: Sequence[str], comm: Comm) -> None:
        """Before a parameter's first compressed reduction: freeze its variance and find out which
        coordinates are sent. Where its state is another rank's, that rank tells."""
        for key in keys:
            if key not in self._groups:
                continue
            state, group = self._state(self._parameters[key]), self._groups[key]
            if "denominator" not in state:
                if float(state["step"]) == 0:
                    raise RuntimeError(
                        f"{key!r} is to be compressed before its first step; call step() after each "
                        "backward, or raise freeze_step"
                    )
                self.freeze(state, group)
                self.param_groups[0][_FROZEN_AT] = self.reducer.policy.start_step
        if self._sharded and keys:
            self._share(keys, comm)
        for key in keys:
            p = self._parameters[key]
            moves = self._moves(key)
            if p in self._masks:
                moves = moves & self._masks[p]
            self._coordinates.set(key, moves)

    def _moves(self, key: str) -> Tensor:
        if key in self._groups:
            denominator: Tensor = self.state[self._parameters[key]]["denominator"]
            return denominator.isfinite()
        return self._remote_moves.pop(key)

    def _share(self, keys: Sequence[str], comm: Comm) -> None:
        """Every rank needs every momentum from now on: owners contribute, the others add zeros."""
        parts = []
        for key in keys:
            p = self._parameters[key]
            if key in self._groups:
                state = self.state[p]
                parts += [state["exp_avg"].reshape(-1), state["denominator"].isfinite().reshape(-1)]
            else:
                parts += [torch.zeros(2 * p.numel(), device=p.device)]
        flat = comm.all_reduce(torch.cat([part.float() for part in parts]))
        for key, both in zip(
            keys,
            flat.split_with_sizes([2 * self._parameters[k].numel() for k in keys]),
            strict=True,
        ):
            if key not in self._groups:
                p = self._parameters[key]
                self._remote[key] = both[: p.numel()].view(p.shape).clone()
                self._remote_moves[key] = both[p.numel() :].view(p.shape) > 0

    @property
    def _device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    def _look_at_variance(self) -> None:
        total = torch.zeros((), dtype=torch.float64)
        for name in self._groups:
            v = self.state[self._parameters[name]]["exp_avg_sq"]
            total += torch.linalg.vector_norm(v, 1).double().cpu()
        if self.reducer.shards is not None:
            total = self.reducer.shards.all_reduce(total.view(1).to(self._device)).view(()).cpu()
        if self._sharded:
            assert self.comm is not None
            total = self.comm.all_reduce(total.to(self._device)).cpu()
        if self._watch.settled(float(total)):
            self._start_at(self.reducer.step)
        self.param_groups[0][_WATCH] = self._watch.norms


def _check(
    defaults: Mapping[str, Any],
    freeze_step: FreezeStep,
    warmup_steps: int,
    max_grad_norm: float,
    clip: str,
    variance_floor: float,
) -> None:
    check_adam(defaults["lr"], defaults["betas"], defaults["eps"], defaults["weight_decay"])
    if freeze_step != "auto":
        if isinstance(freeze_step, bool) or not isinstance(freeze_step, int) or freeze_step < 1:
            raise ValueError(
                f"freeze_step={freeze_step!r} must be 'auto' or a number of steps >= 1; 15 to 25 % of "
                "the run is a good choice"
            )
        if freeze_step < warmup_steps:
            raise ValueError(
                f"freeze_step={freeze_step} must not come before the learning-rate warm-up ends at "
                f"warmup_steps={warmup_steps}: the variance is not steady there; raise freeze_step"
            )
    require_norm("max_grad_norm", max_grad_norm)
    if clip not in ("momentum", "gradient"):
        raise ValueError(f"clip={clip!r} must be 'momentum' or 'gradient'")
    if not 0 <= variance_floor < 1:
        raise ValueError(f"variance_floor={variance_floor} must be in [0, 1); use 0, or 1e-3")

"""1-bit LAMB."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .base import Parameters
from .onebit import FreezeStep, OneBitOptimizer


class OneBitLamb(OneBitOptimizer):
    """LAMB whose momentum travels as signs once its variance is steady (Li et al. 2021, algorithm 1).

    Before ``freeze_step`` it is LAMB (You et al. 2020): ``x = x - lr c u`` with ``u = m / (sqrt(v) + eps) +
    lambda x`` and, per tensor, ``c = clip(|x| / |u|)``, of which a running mean is kept. After it the variance
    is frozen, and c follows that mean, corrected by how the variance would have gone on: from the momenta
    that arrive, gradients are rebuilt, ``(m_t - beta1 m_{t-1}) / (1 - beta1)``, and feed a fresh variance v';
    ``f = max(sqrt(v) / sqrt(v'))``, kept within bounds and within ``factor_threshold`` of its last value.

    Momenta carry one scale per tensor here, so the paper's scaling of tensors to a common magnitude is not
    needed. No bias correction, as in the paper. Memory: 12 bytes per parameter (m, v*, v'), and residuals of
    4 + 4/W.

    Args:
        params: parameters or groups; one trust ratio per parameter tensor.
        lr: as for LAMB.
        betas: in (0, 1).
        eps: added to the root of the variance.
        weight_decay: part of the trust ratio's update, as in LAMB.
        freeze_step: steps before compression, or "auto"; see :class:`OneBitAdam`.
        warmup_steps: of the learning rate.
        ratio_threshold: of "auto".
        max_coeff: largest trust ratio; 0.3 for BERT.
        min_coeff: smallest trust ratio.
        coeff_beta: of the running mean of c; 1 / (1 - coeff_beta) steps should fit into the warm-up.
        factor_max: largest f.
        factor_min: smallest f.
        factor_threshold: largest relative change of f in a step.
        scale: "l1" or "rms", see :class:`~commkit.compressors.Sign`.
        max_grad_norm: as for :class:`OneBitAdam`.
        clip: as for :class:`OneBitAdam`.
        variance_floor: as for :class:`OneBitAdam`.
        min_numel: smaller tensors stay with dense LAMB.
        exclude: and so do parameters whose name matches one of these shell patterns.

    Raises:
        ValueError: a value out of range, or freeze_step before warmup_steps.
    """

    corrects_bias = False

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        freeze_step: FreezeStep = "auto",
        warmup_steps: int = 0,
        ratio_threshold: float = 0.96,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        coeff_beta: float = 0.9,
        factor_max: float = 4.0,
        factor_min: float = 0.5,
        factor_threshold: float = 0.1,
        scale: Literal["l1", "rms"] = "l1",
        max_grad_norm: float = 0.0,
        clip: Literal["momentum", "gradient"] = "momentum",
        variance_floor: float = 0.0,
        min_numel: int = 1024,
        exclude: Sequence[str] = (),
    ) -> None:
        if not 0 < min_coeff <= max_coeff:
            raise ValueError(
                f"min_coeff={min_coeff} must be in (0, max_coeff={max_coeff}]; use for example 0.01 and 10"
            )
        if not 0 < factor_min <= 1 <= factor_max:
            raise ValueError(
                f"factor_min={factor_min} and factor_max={factor_max} must lie around 1; use 0.5 and 4"
            )
        for name, value in {"coeff_beta": coeff_beta, "factor_threshold": factor_threshold}.items():
            if not 0 < value < 1:
                raise ValueError(f"{name}={value} must be in (0, 1); see the docstring")
        self._coeff = (min_coeff, max_coeff, coeff_beta)
        self._factor = (factor_min, factor_max, factor_threshold)
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            freeze_step=freeze_step,
            warmup_steps=warmup_steps,
            ratio_threshold=ratio_threshold,
            scale=scale,
            max_grad_norm=max_grad_norm,
            clip=clip,
            variance_floor=variance_floor,
            min_numel=min_numel,
            exclude=exclude,
        )

    def apply_dense(
        self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(g, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = state["exp_avg"] / (state["exp_avg_sq"].sqrt().add_(group["eps"]))
        update.add_(p, alpha=group["weight_decay"])
        low, high, beta = self._coeff
        sizes = self.norm(p), self.norm(update)
        coeff = 1.0
        if sizes[0] > 0 and sizes[1] > 0:
            coeff = min(max(sizes[0] / sizes[1], low), high)
            # From the first value on, not from 0: a mean of few values would start far too small.
            before = state.get("coeff")
            state["coeff"] = coeff if before is None else beta * before + (1 - beta) * coeff
        p.add_(update, alpha=-group["lr"] * coeff)

    def freeze(self, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["fresh_avg_sq"] = state["exp_avg_sq"].clone()
        state["factor"] = 1.0
        super().freeze(state, group)

    def apply_compressed(
        self, p: Tensor, momentum: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        beta1, beta2 = group["betas"]
        rebuilt = (momentum - state["exp_avg"] * beta1).div_(1 - beta1)
        fresh = state["fresh_avg_sq"].mul_(beta2).addcmul_(rebuilt, rebuilt, value=1 - beta2)
        state["exp_avg"].copy_(momentum)
        frozen = state["denominator"]
        preliminary = momentum / frozen
        update = torch.add(preliminary, p, alpha=group["weight_decay"])
        moves = frozen.isfinite()
        ratios = torch.where(moves, frozen / fresh.sqrt().add_(group["eps"]), 0.0)
        ratio = ratios.max() if ratios.numel() else ratios.new_zeros(())  # an empty shard
        if self.reducer.shards is not None:
            ratio = self.reducer.shards.all_reduce(ratio.view(1), "max").view(())
        factor = float(ratio) if bool(ratio > 0) else 1.0
        size = self.norm(update)
        if group["weight_decay"] > 0 and size > 0:
            # The decay's part of the update does not depend on the variance.
            share = min(1.0, self.norm(preliminary) / size)
            factor = factor * share + (1 - share)
        low, high, threshold = self._factor
        last = state["factor"]
        factor = min(max(factor, low), high)
        factor = min(max(factor, last * (1 - threshold)), last * (1 + threshold))
        state["factor"] = factor
        p.add_(update, alpha=-group["lr"] * state.get("coeff", 1.0) * factor)

"""1-bit Adam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from .adam import adamw_, frozen_adamw_
from .base import Parameters
from .onebit import FreezeStep, OneBitOptimizer


class OneBitAdam(OneBitOptimizer):
    """AdamW whose momentum travels as signs once its variance is steady (Tang et al. 2021, algorithm 1).

    Before ``freeze_step`` it is ``torch.optim.AdamW`` on the mean gradient. After it the variance is frozen
    at v*, with the bias correction that it has there, and ``x = x (1 - lr lambda) - lr m / ((1 - beta1^t)
    (sqrt(v*) + eps))``. One bit per element each way: 1/32 of an fp32 all-reduce.

    Attach it: ``commkit.attach(ddp_model, OneBitAdam(ddp_model.parameters(), ...))``. Works with gradient
    accumulation, unused parameters, bf16 and GradScaler (``attach(..., grad_scaler=)``), and as the
    ``optimizer_class`` of ``ZeroRedundancyOptimizer``. Memory: 8 bytes per parameter as Adam, and residuals
    of 4 + 4/W.

    Args:
        params: parameters or groups. A group may have its own lr, betas, eps and weight_decay.
        lr: as for Adam, schedules too.
        betas: in (0, 1).
        eps: added to the root of the variance.
        weight_decay: decoupled; never enters the momentum.
        freeze_step: steps before compression. "auto" waits until the variance is steady, see
            :class:`~commkit.optim.freezing.VarianceWatch`; 15 to 25 % of the run is the rule of thumb.
        warmup_steps: of the learning rate; the variance is not frozen before they are over.
        ratio_threshold: of "auto".
        scale: "l1" or "rms", see :class:`~commkit.compressors.Sign`.
        max_grad_norm: 0 does not clip. In the warm-up the mean gradient is clipped.
        clip: what is clipped in the compressed stage. "momentum": the momentum that arrived, at no cost.
            "gradient": every rank's gradient, all by one coefficient from the root mean square of their
            norms; that is at least the norm of the mean, so it clips more often than dense training does,
            and reductions wait for the end of backward.
        variance_floor: v* is at least this share of its tensor's mean, for coordinates that were hardly
            ever touched; 1e-3 tames embeddings of rare tokens.
        min_numel: smaller tensors stay with dense Adam and a live variance.
        exclude: and so do parameters whose name matches one of these shell patterns.

    Raises:
        ValueError: a value out of range, or freeze_step before warmup_steps.
    """

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
        scale: Literal["l1", "rms"] = "l1",
        max_grad_norm: float = 0.0,
        clip: Literal["momentum", "gradient"] = "momentum",
        variance_floor: float = 0.0,
        min_numel: int = 1024,
        exclude: Sequence[str] = (),
    ) -> None:
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
        adamw_(p, g, state, group)

    def apply_compressed(
        self, p: Tensor, momentum: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        frozen_adamw_(p, momentum, state, group)

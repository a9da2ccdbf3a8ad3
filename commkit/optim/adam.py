"""One step of AdamW, and what its settings may be."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import ops


def adamw_(p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """``torch.optim.AdamW``'s update in its order of operations, so that the bits agree. ``state["step"]``
    counts this step already; ``exp_avg`` and ``exp_avg_sq`` are updated."""
    beta1, beta2 = group["betas"]
    step = float(state["step"])
    p.mul_(1 - group["lr"] * group["weight_decay"])
    state["exp_avg"].lerp_(g, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (state["exp_avg_sq"].sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
    p.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1**step))


def frozen_adamw_(
    p: Tensor, momentum: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> None:
    """``exp_avg = momentum`` and AdamW's step with the variance frozen in ``state["denominator"]``: ``x = x (1 -
    lr lambda) - lr m / ((1 - beta1^t) denominator)``. ``state["step"]`` counts this step already."""
    correction = 1 - group["betas"][0] ** float(state["step"])
    keep, size = 1 - group["lr"] * group["weight_decay"], group["lr"] / correction
    whole = (p, state["exp_avg"], momentum, state["denominator"])
    flat = [x.reshape(-1) for x in whole]  # copies of what is not contiguous
    ops.frozen_adam_(flat[0], flat[1], flat[2], flat[3], keep, size)
    for x, changed in zip(whole[:2], flat, strict=False):
        if not x.is_contiguous():
            x.copy_(changed.view(x.shape))


def check_adam(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """
    Raises:
        ValueError: a setting out of range.
    """
    if not lr >= 0:
        raise ValueError(f"lr={lr} must be >= 0; use for example 1e-3")
    if not eps > 0:
        raise ValueError(f"eps={eps} must be > 0; use for example 1e-8")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay} must be >= 0; use 0 for none")
    for number, beta in enumerate(betas):
        if not 0 < beta < 1:
            raise ValueError(
                f"betas[{number}]={beta} must be in (0, 1); use for example (0.9, 0.999)"
            )

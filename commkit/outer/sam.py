"""Sharpness-aware gradients for local steps: those of :class:`~commkit.outer.DFedSAM`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..types import Comm

# Below this a gradient has no direction worth following.
_SMALLEST_NORM = 1e-12


def sharpness_aware(
    params: Iterable[Tensor],
    closure: Callable[[], Tensor],
    rho: float = 0.05,
    shards: Comm | None = None,
) -> tuple[Tensor, bool]:
    """Leave in ``.grad`` the gradient at ``x + rho g / ||g||``, with g the gradient at x (Foret et al. 2021; Shi
    et al. 2023 for DFedSAM). The parameters are put back bit for bit; the optimizer's step comes after.

    Costs a second forward and backward pass, and a copy of the parameters while it lasts.

    Args:
        params: the trainable parameters.
        closure: clears the gradients, runs forward and backward on the batch, and returns the loss. Both
            calls must see the same batch.
        rho: how far to look, 0.01 to 0.05; 0 is the plain gradient, at the plain price.
        shards: the group over which this replica's model is split, for the norm of the whole; None: it is not.

    Returns:
        The loss at x, and whether both gradients were finite. If not, skip the step.

    Raises:
        ValueError: rho is negative or not finite.
    """
    check_rho(rho)
    params = list(params)
    loss, norm = closure(), _gradient_norm(params, shards)
    if rho == 0 or not _SMALLEST_NORM <= norm < math.inf:
        return loss, math.isfinite(norm)
    kept = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            for p in params:
                if p.grad is not None:
                    p.add_(p.grad, alpha=rho / norm)
        closure()
    finally:
        with torch.no_grad():
            for p, old in zip(params, kept, strict=True):
                p.copy_(old)
    return loss, math.isfinite(_gradient_norm(params, shards))


def check_rho(rho: float) -> None:
    """
    Raises:
        ValueError: rho is negative or not finite.
    """
    if not 0 <= rho < math.inf:
        raise ValueError(f"rho={rho} must be >= 0 and finite; use 0.05, or 0 for plain gradients")


def _gradient_norm(params: Iterable[Tensor], shards: Comm | None) -> float:
    """2-norm over all parameters, of all shards."""
    grads = [p.grad for p in params if p.grad is not None]
    device = grads[0].device if grads else torch.device("cpu")
    square = torch.zeros((), dtype=torch.float64, device=device)
    for grad in grads:
        square += torch.linalg.vector_norm(grad, dtype=torch.float64).square()
    if shards is not None:
        shards.all_reduce(square)
    return math.sqrt(float(square))

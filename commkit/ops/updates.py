"""Pure-torch kernels of whole-tensor updates. Every product and sum is rounded by itself: nothing is fused
into one rounding, so that all kernels and processors give the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from .selection import largest_of_rows


def correct_momentum_(
    u: Tensor,
    v: Tensor,
    g: Tensor,
    velocity: Tensor | None,
    unsent: Tensor | None,
    momentum: float,
    nesterov: bool,
) -> None:
    """``u = momentum velocity + g`` and ``v = unsent + u``; with ``nesterov`` ``u = momentum (velocity + g)``
    and ``v = (unsent + u) + g``. Without a velocity u is ``g`` (``momentum g``); without anything unsent v is
    u (``u + g``)."""
    g = g.to(u.dtype)
    if nesterov:
        torch.mul(g if velocity is None else velocity + g, momentum, out=u)
    elif velocity is None:
        u.copy_(g)
    else:
        torch.mul(velocity, momentum, out=u).add_(g)
    if unsent is None:
        v.copy_(u)
    else:
        torch.add(unsent, u, out=v)
    if nesterov:
        v.add_(g)


def dgc_step_(
    u: Tensor,
    v: Tensor,
    g: Tensor,
    velocity: Tensor | None,
    unsent: Tensor | None,
    momentum: float,
    nesterov: bool,
    masking: bool,
    negligible: float,
    k: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """:func:`correct_momentum_`; then the k largest of v, as ``largest_of_rows`` finds them, are taken out:
    v is 0 there, and with ``masking`` u too, except where the magnitude is at most ``negligible``. Returns
    where they are, and what was there. ``seed`` changes nothing of the result."""
    correct_momentum_(u, v, g, velocity, unsent, momentum, nesterov)
    places = largest_of_rows(v.unsqueeze(0), k)[0]
    values = v.index_select(0, places)
    v.index_fill_(0, places, 0)
    if masking:
        u.index_fill_(0, places[~(values.abs() <= negligible)], 0)
    return places, values


def frozen_adam_(
    p: Tensor, exp_avg: Tensor, momentum: Tensor, denominator: Tensor, keep: float, size: float
) -> None:
    """``exp_avg = momentum`` and ``p = keep p + (-size momentum) / denominator``, in this order."""
    exp_avg.copy_(momentum)
    p.mul_(keep).addcdiv_(momentum, denominator, value=-size)

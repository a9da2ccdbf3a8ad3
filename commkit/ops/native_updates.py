"""Compiled kernels of whole-tensor updates."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from . import reference
from .binding import DTYPES, empty, fits, flat, kernel, run
from .selection import groups_around


def serves_correction(
    u: Tensor, v: Tensor, g: Tensor, velocity: Tensor | None, unsent: Tensor | None
) -> bool:
    """float32, and g of bfloat16 and float16 too."""
    works = [x for x in (u, v, velocity, unsent) if x is not None]
    return flat(g) and all(fits(x, g.numel(), torch.float32, g.device) for x in works)


@kernel("CPU", "CUDA")
def correct_momentum_(
    u: Tensor,
    v: Tensor,
    g: Tensor,
    velocity: Tensor | None,
    unsent: Tensor | None,
    momentum: float,
    nesterov: bool,
) -> None:
    """float32, bfloat16, float16."""
    if serves_correction(u, v, g, velocity, unsent):
        dtype, n = DTYPES[g.dtype], g.numel()
        run("ck_correct_momentum", g, dtype, n, velocity, unsent, momentum, nesterov, u, v)
    else:
        reference.correct_momentum_(u, v, g, velocity, unsent, momentum, nesterov)


@kernel()
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
    """float32, bfloat16, float16."""
    n = g.numel()
    if not (serves_correction(u, v, g, velocity, unsent) and 1 <= k <= n and 0 <= negligible < inf):
        return reference.dgc_step_(
            *(u, v, g, velocity, unsent, momentum, nesterov, masking, negligible, k, seed)
        )
    places, values = empty((k,), torch.int64, g.device), empty((k,), torch.float32, g.device)
    how = velocity, unsent, momentum, nesterov, masking, negligible, *groups_around(n, k, seed)
    if run("ck_dgc_step", g, DTYPES[g.dtype], n, *how, k, u, v, places, values):
        raise MemoryError("no memory for the candidates of dgc_step_")
    return places, values


@kernel("CPU", "CUDA")
def frozen_adam_(
    p: Tensor, exp_avg: Tensor, momentum: Tensor, denominator: Tensor, keep: float, size: float
) -> None:
    """float32."""
    n = p.numel()
    if all(fits(x, n, torch.float32, p.device) for x in (p, exp_avg, momentum, denominator)):
        run("ck_frozen_adam", p, exp_avg, momentum, denominator, keep, size, n)
    else:
        reference.frozen_adam_(p, exp_avg, momentum, denominator, keep, size)

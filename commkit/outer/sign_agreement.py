"""Generalised task arithmetic: only what points the majority's way is averaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..types import Comm
from .roster import Roster

Majority: TypeAlias = Literal["sum", "count"]
_NOBODY = 1e-8


def keep_majority(
    values: Mapping[str, Tensor], majority: Majority, comm: Comm, roster: Roster
) -> dict[str, Tensor]:
    """Zero the elements of ``values``, in place, whose sign is not that of the majority of ranks.
    Collective over ``comm``: two dense all-reduces of their size.

    Args:
        values: this rank's; overwritten.
        majority: the sign of the elements' sum ("sum"), or of the sum of their signs ("count").
        comm: the ranks.
        roster: whose values count at all.

    Returns:
        By name, what to divide the weighted mean of the masked values by: the weight of the ranks that agreed
        on each element, of 1; 1 where nobody did.
    """
    if not roster.weights[comm.rank]:
        for x in values.values():
            x.zero_()  # a product would keep NaN
    share = roster.weights[comm.rank] / sum(roster.weights)
    flat = torch.cat([x.reshape(-1) for x in values.values()])
    ballots = flat.sign() if majority == "count" else flat.clone()
    agrees = flat.sign() == comm.all_reduce(ballots).sign()
    weight = comm.all_reduce(agrees.to(flat.dtype) * share)
    weight = weight.where(weight >= _NOBODY, 1.0)
    sizes = [x.numel() for x in values.values()]
    pieces = zip(agrees.split_with_sizes(sizes), weight.split_with_sizes(sizes), strict=True)
    divisors = {}
    for (name, x), (agree, divisor) in zip(values.items(), pieces, strict=True):
        x.mul_(agree.view(x.shape))
        divisors[name] = divisor.view(x.shape)
    return divisors

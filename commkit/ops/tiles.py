"""Pure-torch kernel of matrices that are tiled and given by a few coefficients of each tile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .selection import scatter_accumulate_


def combine_tiles_(
    out: Tensor,
    places: Sequence[Tensor],
    values: Sequence[Tensor],
    tall: Tensor,
    wide: Tensor,
    columns: int,
    subtract: bool,
) -> None:
    """``out = X`` or ``out -= X`` where each tile of X is ``tall^T C wide``, and a coefficient of C is the mean
    over those rows (``places[r]``, ``values[r]``) that hold it; one of value 0 is not held.

    ``out`` is X by rows, in ``columns`` tiles side by side, as many on top of each other as there are; row i
    of ``places`` is of tile i, row by row, with places in C by rows that do not repeat.
    """
    height, width = tall.shape[0], wide.shape[0]
    size = height * width
    tiles = out.numel() // size
    first = torch.arange(tiles, device=out.device).unsqueeze(1) * size
    sent = [((first + p).view(-1), v.reshape(-1)) for p, v in zip(places, values, strict=True)]
    holders = torch.zeros_like(out, memory_format=torch.contiguous_format)
    for where, what in sent:
        scatter_accumulate_(holders, where, (what != 0).to(out.dtype))
    mean = torch.zeros_like(holders)
    for where, what in sent:
        # divided first: the sum may not exist where the mean does
        scatter_accumulate_(mean, where, what / holders.index_select(0, where).clamp_(min=1))
    rows = tiles // max(columns, 1)
    x = mean.view(rows, columns, height, width).transpose(1, 2).reshape(-1, width) @ wide
    x = (tall.T @ x.view(rows, height, columns * width)).view(-1)
    if subtract:
        out.sub_(x)
    else:
        out.copy_(x)

"""The compiled kernel of tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .binding import flat, kernel, run


@kernel()
def combine_tiles_(
    out: Tensor,
    places: Sequence[Tensor],
    values: Sequence[Tensor],
    tall: Tensor,
    wide: Tensor,
    columns: int,
    subtract: bool,
) -> None:
    """float32. Its work is proportional to the number of coefficients, as that of the reference is not."""
    every = [*places, *values, tall, wide]
    if not (
        flat(out, torch.float32)
        and all(x.is_contiguous() and x.device == out.device for x in every)
        and all(x.dtype == torch.float32 for x in (*values, tall, wide))
        and all(p.dtype == torch.int16 for p in places)
    ):
        reference.combine_tiles_(out, places, values, tall, wide, columns, subtract)
        return
    height, width = tall.shape[0], wide.shape[0]
    rows, k = out.numel() // (height * width * max(columns, 1)), places[0].shape[1]
    shape = (rows, height, columns, width)
    if run(
        *("ck_combine_tiles", out, *shape, list(places), list(values), len(places), k),
        *(tall, wide, subtract),
    ):
        raise IndexError(f"places has one outside of a tile, which has {height * width} elements")

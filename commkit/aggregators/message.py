"""Many payloads in one byte buffer, so that a reduction costs one collective per stage."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from ..types import Payload

_ALIGN = 8


def encode(payloads: Sequence[Payload], flag: Tensor) -> Tensor:
    """uint8 buffer: all tensors, widest dtype first so that each is aligned, then one flag byte (1 when
    ``flag`` is not finite), then zeros up to a multiple of 8."""
    parts = [payloads[i][j].reshape(-1).view(torch.uint8) for i, j in _widest_first(payloads)]
    size = sum(part.numel() for part in parts)
    tail = torch.zeros(1 + -(size + 1) % _ALIGN, dtype=torch.uint8, device=flag.device)
    tail[:1] = (~flag.isfinite()).to(torch.uint8)
    return torch.cat([*parts, tail])


def size_of(like: Sequence[Payload]) -> int:
    """Bytes of the message of payloads ``like``."""
    size = sum(t.numel() * t.element_size() for payload in like for t in payload) + 1
    return size + -size % _ALIGN


def decode(buffer: Tensor, like: Sequence[Payload]) -> list[Payload]:
    """Views into ``buffer`` with the shapes and dtypes of the payloads ``like``."""
    decoded: list[list[Tensor]] = [list(payload) for payload in like]
    offset = 0
    for dtype, run in groupby(_widest_first(like), lambda at: like[at[0]][at[1]].dtype):
        places = list(run)
        sizes = [like[i][j].numel() for i, j in places]
        end = offset + sum(sizes) * dtype.itemsize
        parts = buffer[offset:end].view(dtype).split_with_sizes(sizes)
        for (i, j), part in zip(places, parts, strict=True):
            decoded[i][j] = part.view(like[i][j].shape)
        offset = end
    return [tuple(payload) for payload in decoded]


def flag_of(buffer: Tensor, like: Sequence[Payload]) -> Tensor:
    """0-d float32 of a received message: 0, or NaN when its sender saw inf or NaN."""
    at = sum(t.numel() * t.element_size() for payload in like for t in payload)
    return torch.where(buffer[at] > 0, torch.nan, 0.0)


def _widest_first(payloads: Sequence[Payload]) -> list[tuple[int, int]]:
    places = [(i, j) for i, payload in enumerate(payloads) for j in range(len(payload))]
    return sorted(places, key=lambda at: -payloads[at[0]][at[1]].element_size())

"""Many payloads in one byte buffer, so that a reduction costs one collective per stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from ..types import Payload

_ALIGN = 8


class Layout:
    """Where the tensors of payloads are in their message: all of them, widest dtype first so that each is aligned, then
    one flag byte, then zeros up to a multiple of 8.

    Args:
        like: payloads of any device with the shape and dtype of every tensor.

    Attributes:
        size: bytes of a message.
        flag_at: where the flag is.
    """

    __slots__ = ("_like", "_runs", "flag_at", "size")

    def __init__(self, like: Sequence[Payload]) -> None:
        places = [(i, j) for i, payload in enumerate(like) for j in range(len(payload))]
        places.sort(key=lambda at: -like[at[0]][at[1]].element_size())
        # Of each dtype: the places, and how many elements each has.
        self._runs: list[tuple[torch.dtype, list[tuple[int, int]], list[int]]] = []
        self.flag_at = 0
        for dtype, run in groupby(places, lambda at: like[at[0]][at[1]].dtype):
            of_dtype = list(run)
            sizes = [like[i][j].numel() for i, j in of_dtype]
            self._runs.append((dtype, of_dtype, sizes))
            self.flag_at += sum(sizes) * dtype.itemsize
        self.size = self.flag_at + 1 + -(self.flag_at + 1) % _ALIGN
        self._like = like

    def encode(self, payloads: Sequence[Payload], flag: Tensor) -> Tensor:
        """The message, uint8; its flag is 1 when ``flag`` is not finite."""
        parts: list[Tensor] = []
        for dtype, places, _ in self._runs:
            flats = [_flat(payloads[i][j]) for i, j in places]
            if dtype != torch.uint8:
                flats = [(flats[0] if len(flats) == 1 else torch.cat(flats)).view(torch.uint8)]
            parts += flats
        return torch.cat([*parts, self._tail(flag)])

    def decode(self, message: Tensor) -> list[Payload]:
        """Views into ``message`` with the shapes and dtypes of the payloads."""
        decoded: list[list[Tensor]] = [list(payload) for payload in self._like]
        offset = 0
        for dtype, places, sizes in self._runs:
            end = offset + sum(sizes) * dtype.itemsize
            parts = message[offset:end].view(dtype).split_with_sizes(sizes)
            for (i, j), part in zip(places, parts, strict=True):
                like = self._like[i][j]
                decoded[i][j] = part if like.dim() == 1 else part.view(like.shape)
            offset = end
        return [tuple(payload) for payload in decoded]

    def flag(self, message: Tensor) -> Tensor:
        """0-d float32: 0, or NaN when the sender of ``message`` saw inf or NaN."""
        return torch.where(message[self.flag_at] > 0, torch.nan, 0.0)

    def mark(self, message: Tensor) -> Tensor:
        """0-d uint8: the flag itself."""
        return message[self.flag_at]

    def _tail(self, flag: Tensor) -> Tensor:
        rest = self.size - self.flag_at
        if flag.device.type == "cpu":
            bad = not math.isfinite(flag)
            return torch.tensor([bad, *[False] * (rest - 1)], dtype=torch.uint8)
        tail = torch.zeros(rest, dtype=torch.uint8, device=flag.device)
        tail[:1] = (~flag.isfinite()).to(torch.uint8)
        return tail


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 1 and x.is_contiguous() else x.reshape(-1)

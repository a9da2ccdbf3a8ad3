"""Which coordinates of each parameter travel, where signs cannot say zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Coordinates:
    """Flat indices of the coordinates that are sent, by parameter; the same on every rank.

    What is left out takes no part in the scale of the others and costs no bytes.
    """

    def __init__(self) -> None:
        self._valid: dict[str, Tensor | None] = {}  # None is all of them

    def __contains__(self, key: str) -> bool:
        return key in self._valid

    def set(self, key: str, moves: Tensor) -> None:
        """``moves``: bool, of the parameter's shape."""
        self._valid[key] = None if bool(moves.all()) else moves.reshape(-1).nonzero().view(-1)

    def drop(self, key: str) -> bool:
        """Forget ``key``; whether anything was known of it."""
        return self._valid.pop(key, self) is not self

    def clear(self) -> None:
        self._valid.clear()

    def pack(self, key: str, x: Tensor) -> Tensor | None:
        """What is sent of ``x``: itself, its valid elements as (k,), or None if there are none."""
        valid = self._valid.get(key)
        if valid is None:
            return x
        return x.reshape(-1)[valid] if valid.numel() else None

    def unpack(
        self, results: Mapping[str, Tensor], named: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Results of packed tensors in the shapes of ``named``, zeros elsewhere."""
        whole: dict[str, Tensor] = {}
        for key, x in named.items():
            valid = self._valid.get(key)
            result = results.get(key)
            if valid is None or (result is not None and result.shape == x.shape):
                whole[key] = results[key]
                continue
            flat = torch.zeros(x.numel(), dtype=torch.float32, device=x.device)
            if result is not None:
                flat[valid] = result.to(flat.dtype)
            whole[key] = flat.view(x.shape)
        return whole

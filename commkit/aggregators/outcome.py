"""An outcome that is still in payloads, and goes straight to where it is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import empty
from ..types import Aggregated, Compressor, Payload, TensorCtx


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive elements of a tensor, from ``start`` on.

    Args:
        start: their offset.
        ctx: of them alone.
        received: payloads whose combination is the mean.
        own: what this rank contributed.
    """

    start: int
    ctx: TensorCtx
    received: Sequence[Payload]
    own: Payload

    def of(self, flat: Tensor) -> Tensor:
        """This part of the flattened tensor."""
        return flat[self.start : self.start + self.ctx.numel]


class Decoded(Aggregated):
    """The outcome of a tensor whose ``parts``, which cover it, are compressed each on its own."""

    __slots__ = ("_compressor", "_ctx", "_parts")

    def __init__(
        self, compressor: Compressor, ctx: TensorCtx, parts: Sequence[Part], ranks: int
    ) -> None:
        super().__init__(self._form_mean, self._form_sent, ranks)
        self._compressor, self._ctx, self._parts = compressor, ctx, parts

    def mean_into(self, out: Tensor) -> None:
        if not self._takes(out):
            super().mean_into(out)
            return
        flat = out.view(-1)
        for part in self._parts:
            self._compressor.combine_into(part.of(flat), part.received, part.ctx)

    def take_sent_from(self, compensated: Tensor) -> bool:
        if not self._takes(compensated):
            return False
        flat = compensated.view(-1)
        for part in self._parts:
            self._compressor.subtract_(part.of(flat), part.own, part.ctx)
        return True

    def sent_places(self) -> Tensor | None:
        found = [self._compressor.places(part.own, part.ctx) for part in self._parts]
        known = [places for places in found if places is not None]
        if not known or len(known) < len(found):
            return None
        starts = (part.start for part in self._parts)
        return torch.cat([places + start for places, start in zip(known, starts, strict=True)])

    def _takes(self, x: Tensor) -> bool:
        return x.dtype == self._ctx.work_dtype and x.is_contiguous()

    def _form_mean(self) -> Tensor:
        mean = empty(self._ctx.shape, self._ctx.work_dtype, self._ctx.device)
        self.mean_into(mean)
        return mean

    def _form_sent(self) -> Tensor:
        decompress = self._compressor.decompress
        sent = [decompress(part.own, part.ctx).view(-1) for part in self._parts]
        if not sent:
            return torch.zeros(self._ctx.shape, dtype=self._ctx.work_dtype, device=self._ctx.device)
        return (sent[0] if len(sent) == 1 else torch.cat(sent)).view(self._ctx.shape)

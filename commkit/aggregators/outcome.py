"""An outcome that is still in payloads, and goes straight to where it is wanted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..addends import Debt, debt_of
from ..metrics import profiler_range
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

    __slots__ = ("_ctx", "compressor", "parts")

    def __init__(
        self, compressor: Compressor, ctx: TensorCtx, parts: Sequence[Part], ranks: int
    ) -> None:
        super().__init__(self._form_mean, self._form_sent, ranks)
        self.compressor, self._ctx, self.parts = compressor, ctx, parts

    def mean_into(self, out: Tensor) -> None:
        means_into([self], [out])

    def take_sent_from(self, compensated: Tensor) -> bool:
        return take_sent([self], [compensated])[0]

    def sent_places(self) -> Tensor | None:
        found = [self.compressor.places(part.own, part.ctx) for part in self.parts]
        known = [places for places in found if places is not None]
        if not known or len(known) < len(found):
            return None
        starts = (part.start for part in self.parts)
        return torch.cat([places + start for places, start in zip(known, starts, strict=True)])

    def debt(self) -> Debt | None:
        """What was sent, to be taken by the next pass over the residual; None where it has to be taken now."""
        return debt_of(self.compressor, {part.start: part.own for part in self.parts})

    def takes(self, x: Tensor) -> bool:
        """Whether payloads can be decoded right into ``x``, or subtracted from it."""
        return x.dtype == self._ctx.work_dtype and x.is_contiguous()

    def _form_mean(self) -> Tensor:
        mean = empty(self._ctx.shape, self._ctx.work_dtype, self._ctx.device)
        self.mean_into(mean)
        return mean

    def _form_sent(self) -> Tensor:
        decompress = self.compressor.decompress
        with profiler_range("decompress"):
            sent = [decompress(part.own, part.ctx).view(-1) for part in self.parts]
        if not sent:
            return torch.zeros(self._ctx.shape, dtype=self._ctx.work_dtype, device=self._ctx.device)
        return (sent[0] if len(sent) == 1 else torch.cat(sent)).view(self._ctx.shape)


def means_into(outcomes: Sequence[Aggregated], outs: Sequence[Tensor]) -> None:
    """``mean_into`` of each: of all that one compressor decodes, in one call."""
    together = _Together()
    for outcome, out in zip(outcomes, outs, strict=True):
        if not isinstance(outcome, Decoded):
            outcome.mean_into(out)
        elif not together.takes(outcome, out):
            out.copy_(outcome.mean)
    for compressor, parts, pieces in together.calls():
        with profiler_range("decompress"):
            compressor.combine_each_into(
                pieces, [p.received for p in parts], [p.ctx for p in parts]
            )


def take_sent(outcomes: Sequence[Aggregated], compensated: Sequence[Tensor]) -> list[bool]:
    """``take_sent_from`` of each: of all that one compressor decodes, in one call."""
    together = _Together()
    taken = [
        together.takes(outcome, x) if isinstance(outcome, Decoded) else outcome.take_sent_from(x)
        for outcome, x in zip(outcomes, compensated, strict=True)
    ]
    for compressor, parts, pieces in together.calls():
        with profiler_range("decompress"):
            compressor.subtract_each_(pieces, [p.own for p in parts], [p.ctx for p in parts])
    return taken


class _Together:
    """Parts of many tensors and their places in memory, by compressor."""

    def __init__(self) -> None:
        self._by_id: dict[int, tuple[Compressor, list[Part], list[Tensor]]] = {}

    def takes(self, outcome: Decoded, x: Tensor) -> bool:
        if not outcome.takes(x):
            return False
        compressor, flat = outcome.compressor, x.view(-1)
        _, parts, pieces = self._by_id.setdefault(id(compressor), (compressor, [], []))
        parts += outcome.parts
        pieces += [part.of(flat) for part in outcome.parts]
        return True

    def calls(self) -> Iterable[tuple[Compressor, list[Part], list[Tensor]]]:
        return self._by_id.values()

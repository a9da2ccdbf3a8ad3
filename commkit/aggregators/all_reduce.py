"""All-reduce of summable payloads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..metrics import profiler_range
from ..registry import register
from ..types import Aggregated, Comm, Compressor, Payload, TensorCtx
from .health import health, require_finite
from .stateless import Stateless


@register("aggregator", "all_reduce")
@dataclass(slots=True)
class AllReduce(Stateless):
    """Payloads are divided by the world size, added up in the payload's dtype and decoded once.

    One collective per reduction and payload dtype; 2(W-1)/W times the payload on the wire.

    Args:
        compressor: a summable one.

    Raises:
        TypeError: the compressor's payloads cannot be added up.
    """

    compressor: Compressor

    def __post_init__(self) -> None:
        if self.compressor.wire != "summable":
            raise TypeError(
                f"all_reduce cannot add up payloads of {type(self.compressor).__name__} (wire="
                f"{self.compressor.wire!r}); use aggregator all_gather or two_shot"
            )

    def aggregate(
        self, xs: Sequence[Tensor], ctxs: Sequence[TensorCtx], comm: Comm
    ) -> list[Aggregated]:
        with profiler_range("compress"):
            payloads = self.compressor.compress_each(xs, ctxs, comm.rank)
        reduced = _all_reduce_mean(payloads, health(xs, ctxs[0].device), comm)
        with profiler_range("decompress"):
            means = [self.compressor.decompress(p, c) for p, c in zip(reduced, ctxs, strict=True)]
        require_finite(means)
        return [
            Aggregated(mean, self._sent(x, ctx, comm), comm.world_size)
            for mean, x, ctx in zip(means, xs, ctxs, strict=True)
        ]

    def _sent(self, x: Tensor, ctx: TensorCtx, comm: Comm) -> Callable[[], Tensor]:
        def sent() -> Tensor:
            with profiler_range("decompress"):
                payload = self.compressor.compress(x, ctx, comm.rank)
                scaled = tuple(t.div_(comm.world_size) for t in payload)
                return self.compressor.decompress(scaled, ctx).mul_(comm.world_size)

        return sent


def _all_reduce_mean(payloads: Sequence[Payload], flag: Tensor, comm: Comm) -> list[Payload]:
    """The mean of every payload, the flag added to the first buffer."""
    reduced = [list(payload) for payload in payloads]
    places = [(i, j) for i, payload in enumerate(payloads) for j in range(len(payload))]
    for dtype in dict.fromkeys(payloads[i][j].dtype for i, j in places):
        same = [(i, j) for i, j in places if payloads[i][j].dtype == dtype]
        parts = [payloads[i][j].view(-1) for i, j in same]
        flat = torch.cat([*parts, flag.to(parts[0]).view(1)])
        comm.all_reduce(flat.div_(comm.world_size))
        require_finite([flat])
        for (i, j), view in zip(
            same, flat[:-1].split_with_sizes([p.numel() for p in parts]), strict=True
        ):
            reduced[i][j] = view
    return [tuple(payload) for payload in reduced]

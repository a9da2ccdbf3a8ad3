"""All-gather of payloads: everybody decodes everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..metrics import profiler_range
from ..registry import register
from ..types import Aggregated, Comm, Compressor, Payload, TensorCtx
from .health import health, require_unmarked
from .message import Layout
from .outcome import Decoded, Part
from .stateless import Stateless


@register("aggregator", "all_gather")
@dataclass(slots=True)
class AllGather(Stateless):
    """Every rank sends one message to all others; payloads are combined in rank order.

    One collective per reduction. Bytes grow with W - 1, so it pays for sparse payloads and few ranks;
    for dense codes (int8, sign) two_shot is cheaper from three ranks on.

    Args:
        compressor: one whose payload sizes are known from the shape alone.

    Raises:
        TypeError: payload sizes depend on the data.
    """

    compressor: Compressor

    def __post_init__(self) -> None:
        if not self.compressor.fixed_size:
            raise TypeError(
                f"all_gather needs payloads of a fixed size but {type(self.compressor).__name__} has "
                "fixed_size=False; use a compressor whose payload_bytes depends on the shape alone"
            )

    def aggregate(
        self,
        xs: Sequence[Tensor],
        ctxs: Sequence[TensorCtx],
        comm: Comm,
        made: Sequence[Payload | None] = (),
    ) -> list[Aggregated]:
        """As :meth:`Aggregator.aggregate`. ``made``: where there is a payload already, ``x`` is not compressed;
        it still has to show what is not finite, if the compressor does not."""
        payloads = self._compress(xs, ctxs, made or [None] * len(xs), comm.rank)
        inputs = [] if self.compressor.shows_nonfinite else xs
        flag = health([*inputs, *(t for payload in payloads for t in payload)], ctxs[0].device)
        layout = Layout(payloads)
        rows = comm.all_gather(layout.encode(payloads, flag))
        require_unmarked(map(layout.mark, rows))
        gathered = [layout.decode(row) for row in rows]
        return [
            Decoded(
                self.compressor,
                ctx,
                [Part(0, ctx, [of_rank[i] for of_rank in gathered], payloads[i])],
                comm.world_size,
            )
            for i, ctx in enumerate(ctxs)
        ]

    def _compress(
        self,
        xs: Sequence[Tensor],
        ctxs: Sequence[TensorCtx],
        made: Sequence[Payload | None],
        rank: int,
    ) -> list[Payload]:
        left = [i for i, payload in enumerate(made) if payload is None]
        with profiler_range("compress"):
            rest = self.compressor.compress_each(
                [xs[i] for i in left], [ctxs[i] for i in left], rank
            )
        payloads = dict(zip(left, rest, strict=True))
        return [payload or payloads[i] for i, payload in enumerate(made)]

"""Two-shot all-reduce of compressed payloads: scatter, combine, compress again, gather."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ..addends import Addends, AddendsPart, compresses_sums
from ..feedback import NoFeedback, check_contraction
from ..metrics import profiler_range
from ..registry import register
from ..types import (
    SHARD,
    WHOLE,
    Aggregated,
    Comm,
    Compressor,
    Feedback,
    Payload,
    StateDict,
    TensorCtx,
    section,
)
from .exchange import Exchange
from .health import health
from .mean import mean_of
from .outcome import Decoded, Part
from .serving import serve
from .sharding import Shard, shard_key, shards_of, spans_of
from .summing import compress_sums


@register("aggregator", "two_shot")
@dataclass(slots=True)
class TwoShot:
    """Each rank serves a share of every parameter: it receives all payloads of its share (all-to-all),
    combines them in float32, compresses the mean again and sends it to all (Tang et al. 2021, figure 3).

    Two collectives per reduction; about 2(W-1)/W payloads on the wire at any W. Everyone decodes the
    gathered bytes, the owner too, so that all ranks hold the same bits.

    Args:
        compressor: one whose payload sizes are known from the shape alone. Each shard is compressed on
            its own, with its own scale.
        server_feedback: feedback of the second compression, on the owner's shards: 4/W bytes per
            compressed element with error feedback. Use it when the compressor is biased.
        granule: shards are multiples of this many elements. Larger means fewer, larger messages and
            fewer scales for small tensors.

    Raises:
        TypeError: payload sizes depend on the data, or error feedback diverges on the compressor.
        ValueError: a granule below 8.
    """

    carries_dense: ClassVar[bool] = True

    compressor: Compressor
    server_feedback: Feedback = field(default_factory=NoFeedback)
    granule: int = 4096
    # Flattened server residuals of a run with another number of ranks, until they are dealt out.
    _whole: StateDict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.compressor.fixed_size:
            raise TypeError(
                f"two_shot needs payloads of a fixed size but {type(self.compressor).__name__} has "
                "fixed_size=False; use a compressor whose payload_bytes depends on the shape alone"
            )
        if self.server_feedback.changes_mean:
            raise TypeError(
                f"server_feedback {type(self.server_feedback).__name__} sends differences to an estimate, "
                "which the ranks would have to add up; use error_feedback at the server"
            )
        check_contraction(self.server_feedback, self.compressor, "server_feedback")
        if self.granule < 8:
            raise ValueError(f"granule={self.granule} must be >= 8; use for example 4096")

    @property
    def adds_residuals(self) -> bool:
        return compresses_sums(self.compressor)

    def aggregate(
        self, xs: Sequence[Tensor], ctxs: Sequence[TensorCtx], comm: Comm
    ) -> list[Aggregated]:
        return self.aggregate_sums(xs, [None] * len(xs), ctxs, comm)

    def aggregate_sums(
        self,
        sums: Sequence[Tensor],
        addends: Sequence[Addends | None],
        ctxs: Sequence[TensorCtx],
        comm: Comm,
        dense: Tensor | None = None,
    ) -> list[Aggregated]:
        """See :class:`~commkit.addends.AddsResiduals`; ``dense``: see :class:`~.residuals.CarriesDense`."""
        self._deal_whole(comm)
        of_each = [shards_of(i, ctx, comm.world_size, self.granule) for i, ctx in enumerate(ctxs)]
        with profiler_range("compress"):
            payloads = self._compress(of_each, sums, addends, comm.rank)
        device = ctxs[0].device
        # A pass over every gradient, where no payload tells what it would find.
        inputs = [] if self.compressor.shows_nonfinite else sums
        flag = health([*inputs, *(t for payload in payloads.values() for t in payload)], device)
        carried = () if dense is None else dense.tensor_split(comm.world_size)
        exchange = Exchange(list(payloads), comm, carried)
        received = exchange.to_owners(payloads, flag)
        with profiler_range("serve"):
            rows = [of_rank.pop()[0] for of_rank in received if carried]
            mine = [shard.ctx for shard in exchange.served_by(comm.rank)]
            of_ranks = list(zip(*received, strict=True))
            # ~rank: rounding must be independent of the first stage's.
            combined = serve(self.server_feedback, self.compressor, of_ranks, mine, ~comm.rank)
            flag = health((t for p in combined for t in p), device)
        if carried:
            combined.append((mean_of(rows),))
        means = exchange.to_all(combined, flag)
        return [
            Decoded(
                self.compressor,
                ctx,
                [Part(s.start, s.ctx, [means[s]], payloads[s]) for s in own],
                comm.world_size,
            )
            for ctx, own in zip(ctxs, of_each, strict=True)
        ]

    def _compress(
        self,
        of_each: Sequence[Sequence[Shard]],
        sums: Sequence[Tensor],
        addends: Sequence[Addends | None],
        rank: int,
    ) -> dict[Shard, Payload]:
        shards = [s for own in of_each for s in own]
        flats = [x.reshape(-1) for x in sums]
        parts: dict[Shard, AddendsPart] = {}
        for pair, own in zip(addends, of_each, strict=True):
            if pair is not None:
                parts |= zip(own, pair.parts([(s.start, s.end) for s in own]), strict=True)
        made = compress_sums(
            self.compressor,
            [s.of(flats[s.index]) for s in shards],
            [parts.get(s) for s in shards],
            [s.ctx for s in shards],
            rank,
        )
        return dict(zip(shards, made, strict=True))

    def _deal_whole(self, comm: Comm) -> None:
        """Take this rank's shards of a state that was put together from other owners."""
        if not self._whole:
            return
        state = self.server_feedback.state_dict()
        for key, whole in self._whole.items():
            for start, numel, owner in spans_of(key, whole.numel(), comm.world_size, self.granule):
                if owner == comm.rank:
                    state[shard_key(key, start)] = whole[start : start + numel]
        self.server_feedback.load_state_dict(state)
        self._whole = {}

    def commit(self, ok: bool) -> None:
        self.server_feedback.commit(ok)

    def state_dict(self) -> StateDict:
        shards = self.server_feedback.state_dict()
        return {f"{SHARD}/{key}": value for key, value in shards.items()} | {
            f"{WHOLE}/{key}": value for key, value in self._whole.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.server_feedback.load_state_dict(section(state, SHARD))
        self._whole = section(state, WHOLE)

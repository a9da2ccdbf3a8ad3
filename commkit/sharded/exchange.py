"""How the rows of a flat gradient reach the ranks that own them: in one hop, or node by node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..aggregators.health import health
from ..aggregators.nodes import Placement
from ..feedback import ErrorFeedback
from ..types import Comm
from .layout import Segment
from .message import RowCodec


class Exchange(Protocol):
    """Averages the rows that ranks have for each other."""

    def mean_into(self, out: Tensor, rows: Tensor, segments: Sequence[Segment], step: int) -> None:
        """``rows`` is (W, n), row r for rank r; ``out``, (n,), becomes the mean of what all have for this rank."""


@dataclass(frozen=True, slots=True)
class OneHop:
    """QSDP's (Markov et al. 2023): each row is encoded once and goes straight to its owner, who decodes and averages.
    One all-to-all; (W-1)/W of the encoded gradient is sent.
    """

    codec: RowCodec
    comm: Comm

    def mean_into(self, out: Tensor, rows: Tensor, segments: Sequence[Segment], step: int) -> None:
        me, world_size = self.comm.rank, self.comm.world_size
        messages = [
            self.codec.encode(row, segments, r, step, salt=me * world_size + r)
            for r, row in enumerate(rows)
        ]
        arrived = _all_to_all(messages, self.comm)
        self.codec.decode_into(out, arrived, segments, me, step)


@dataclass(slots=True)
class OneHopWithFeedback:
    """:class:`OneHop` with error feedback: what a rank's messages lose is added to what it sends next. The residual is of
    whole gradients, as large as the model on every rank.

    What it leaves unsent counts from :meth:`commit` on; a step in which any rank had inf or NaN leaves all residuals as
    they were.
    """

    codec: RowCodec
    comm: Comm
    feedback: ErrorFeedback = field(default_factory=ErrorFeedback)
    _finite: bool = field(default=True, init=False)

    def mean_into(self, out: Tensor, rows: Tensor, segments: Sequence[Segment], step: int) -> None:
        me, world_size = self.comm.rank, self.comm.world_size
        sizes = [segment.padded for segment in segments]
        blocks = rows.split_with_sizes(sizes, dim=1)
        own = [self.feedback.compensate(x, s.key) for s, x in zip(segments, blocks, strict=True)]
        whole = torch.cat(own, dim=1)
        flag = health([whole], whole.device)
        messages = [
            self.codec.encode(row, segments, r, step, salt=me * world_size + r, flag=flag)
            for r, row in enumerate(whole)
        ]
        sent = torch.empty_like(whole)
        for r, message in enumerate(messages):
            self.codec.decode_into(sent[r], [message], segments, r, step)
        arrived = _all_to_all(messages, self.comm)
        flags = [self.codec.told_nonfinite(m, whole[me], segments, me, step) for m in arrived]
        self._finite = self._finite and bool(torch.stack(flags).isfinite().all())
        for s, x, lost in zip(segments, own, sent.split_with_sizes(sizes, dim=1), strict=True):
            self.feedback.update(x, lost, s.key)
        mean = torch.empty_like(whole[me])
        self.codec.decode_into(mean, arrived, segments, me, step)
        out.copy_(mean)

    def commit(self) -> None:
        """The step is over: its residuals count, unless it was not finite."""
        self.feedback.commit(self._finite)
        self._finite = True


@dataclass(frozen=True, slots=True)
class TwoHops:
    """ZeRO++'s qgZ (Wang et al. 2023): rows are averaged inside each node first, among the ranks of equal local
    index, and only the node's mean crosses to other nodes, encoded anew. Two all-to-alls; (K-1)/K of 1/L of the
    encoded gradient leaves a rank for other nodes, where one hop sends (K-1)/K of all of it.

    Args:
        inside: how rows are encoded inside a node.
        between: how node means are encoded between nodes.
        place: this rank's comms inside its node and between nodes.
        ranks: ``ranks[k][l]`` is the rank of local index l on node k.
    """

    inside: RowCodec
    between: RowCodec
    place: Placement
    ranks: Sequence[Sequence[int]]

    def mean_into(self, out: Tensor, rows: Tensor, segments: Sequence[Segment], step: int) -> None:
        intra, inter = self.place.intra, self.place.inter
        world_size = rows.shape[0]
        me = self.ranks[inter.rank][intra.rank]
        # To local index l go the rows of all ranks of that index, one for each node.
        messages = [
            torch.cat(
                [
                    self.inside.encode(rows[r], segments, r, step, salt=me * world_size + r)
                    for r in (node[index] for node in self.ranks)
                ]
            )
            for index in range(intra.world_size)
        ]
        arrived = _all_to_all(messages, intra)
        mine = [node[intra.rank] for node in self.ranks]
        sizes = [self.inside.size(rows[r], segments, r, step) for r in mine]
        by_row = zip(*(each.split_with_sizes(sizes) for each in arrived), strict=True)
        work = torch.promote_types(out.dtype, torch.float32)
        means = []
        for r, of_peers in zip(mine, by_row, strict=True):
            mean = torch.empty_like(out, dtype=work)
            self.inside.decode_into(mean, list(of_peers), segments, r, step, rows.dtype)
            means.append(mean)
        if inter.world_size == 1:
            out.copy_(means[0])
            return
        offset = world_size * world_size  # other salts than inside
        onward = [
            self.between.encode(mean, segments, r, step, salt=offset + me * world_size + r)
            for r, mean in zip(mine, means, strict=True)
        ]
        mean = torch.empty_like(out, dtype=work)
        self.between.decode_into(mean, _all_to_all(onward, inter), segments, me, step)
        out.copy_(mean)


def _all_to_all(messages: Sequence[Tensor], comm: Comm) -> list[Tensor]:
    """Message i goes to rank i; what all ranks have for this one, each as long as its own to itself."""
    sizes = [message.numel() for message in messages]
    return comm.all_to_all(torch.cat(list(messages)), sizes, [sizes[comm.rank]] * comm.world_size)

"""The two messages of a two-shot all-reduce: every share to its owner, every answer to all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..types import Comm, Payload
from .health import require_unmarked
from .message import Layout
from .sharding import Shard


@dataclass(frozen=True, slots=True)
class Exchange:
    """One all-to-all each way.

    Args:
        shards: all of a reduction, in the same order on every rank.
        comm: the group.
        carried: each rank's share, 1-D, of what travels along as it is; none at all if there is nothing.
    """

    shards: Sequence[Shard]
    comm: Comm
    carried: Sequence[Tensor] = ()
    _served: list[list[Shard]] = field(init=False, repr=False)
    _layouts: list[Layout] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        served: list[list[Shard]] = [[] for _ in range(self.comm.world_size)]
        for shard in self.shards:
            served[shard.owner].append(shard)
        object.__setattr__(self, "_served", served)

    def served_by(self, rank: int) -> list[Shard]:
        """The shards that ``rank`` owns."""
        return self._served[rank]

    def to_owners(self, payloads: Mapping[Shard, Payload], flag: Tensor) -> list[list[Payload]]:
        """What each rank sent of this rank's shards, in rank order; last of it, if anything is carried, of its share.

        Args:
            payloads: this rank's, of every shard; sizes and dtypes are the same on every rank.
            flag: this rank's :func:`~.health.health`.

        Raises:
            NonFiniteError: on every rank, if any flag is not finite.
        """
        world_size, rank = self.comm.world_size, self.comm.rank
        own = self._with_carried([[payloads[s] for s in shards] for shards in self._served])
        layouts = [Layout(payloads_of_rank) for payloads_of_rank in own]
        self._layouts[:] = layouts
        messages = [l.encode(to_rank, flag) for l, to_rank in zip(layouts, own, strict=True)]
        sizes = [l.size for l in layouts]
        received = self.comm.all_to_all(torch.cat(messages), sizes, [sizes[rank]] * world_size)
        require_unmarked(map(layouts[rank].mark, received))
        return [layouts[rank].decode(message) for message in received]

    def to_all(
        self,
        answers: Sequence[Payload],
        flag: Tensor,
        like: Mapping[Shard, Payload] | None = None,
    ) -> dict[Shard, Payload]:
        """The owners' answers of every shard, the same bytes on every rank; those of what is carried are written there.

        Args:
            answers: of this rank's shards, in their order; last, if anything is carried, of its share.
            flag: health of this rank's answers.
            like: tensors of any device with the shape and dtype of every answer. None: they look like what was sent to
                the owners.

        Raises:
            NonFiniteError: on every rank, if any flag is not finite.
        """
        world_size = self.comm.world_size
        layouts = self._layouts
        if like is not None:
            likes = [[like[s] for s in shards] for shards in self._served]
            layouts = [Layout(like_of_rank) for like_of_rank in self._with_carried(likes)]
        answer = layouts[self.comm.rank].encode(answers, flag)
        received = self.comm.all_to_all(
            answer.repeat(world_size), [answer.numel()] * world_size, [l.size for l in layouts]
        )
        require_unmarked(l.mark(message) for l, message in zip(layouts, received, strict=True))
        decoded = [l.decode(message) for l, message in zip(layouts, received, strict=True)]
        for share, of_rank in zip(self.carried, decoded, strict=False):
            share.copy_(of_rank.pop()[0])
        return {
            s: payload
            for shards, of_rank in zip(self._served, decoded, strict=True)
            for s, payload in zip(shards, of_rank, strict=True)
        }

    def _with_carried(self, of_ranks: list[list[Payload]]) -> list[list[Payload]]:
        for share, of_rank in zip(self.carried, of_ranks, strict=False):
            of_rank.append((share,))
        return of_ranks

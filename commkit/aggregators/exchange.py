"""The two messages of a two-shot all-reduce: every share to its owner, every answer to all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..types import Comm, Payload
from .health import require_finite
from .message import decode, encode, flag_of, size_of
from .sharding import Shard


@dataclass(frozen=True, slots=True)
class Exchange:
    """One all-to-all each way.

    Args:
        shards: all of a reduction, in the same order on every rank.
        comm: the group.
    """

    shards: Sequence[Shard]
    comm: Comm
    _served: list[list[Shard]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        served: list[list[Shard]] = [[] for _ in range(self.comm.world_size)]
        for shard in self.shards:
            served[shard.owner].append(shard)
        object.__setattr__(self, "_served", served)

    def served_by(self, rank: int) -> list[Shard]:
        """The shards that ``rank`` owns."""
        return self._served[rank]

    def to_owners(self, payloads: Mapping[Shard, Payload], flag: Tensor) -> list[list[Payload]]:
        """What each rank sent of this rank's shards, in rank order.

        Args:
            payloads: this rank's, of every shard; sizes and dtypes are the same on every rank.
            flag: this rank's :func:`~.health.health`.

        Raises:
            NonFiniteError: on every rank, if any flag is not finite.
        """
        world_size, rank = self.comm.world_size, self.comm.rank
        messages = [
            encode([payloads[s] for s in self.served_by(to)], flag) for to in range(world_size)
        ]
        sizes = [message.numel() for message in messages]
        received = self.comm.all_to_all(torch.cat(messages), sizes, [sizes[rank]] * world_size)
        like = [payloads[s] for s in self.served_by(rank)]
        require_finite([torch.stack([flag_of(message, like) for message in received])])
        return [decode(message, like) for message in received]

    def to_all(
        self, answers: Sequence[Payload], like: Mapping[Shard, Payload], flag: Tensor
    ) -> dict[Shard, Payload]:
        """The owners' answers of every shard, the same bytes on every rank.

        Args:
            answers: of this rank's shards, in their order.
            like: tensors of any device with the shape and dtype of every answer.
            flag: health of this rank's answers.

        Raises:
            NonFiniteError: on every rank, if any flag is not finite.
        """
        world_size = self.comm.world_size
        likes = [[like[s] for s in shards] for shards in self._served]
        answer = encode(answers, flag)
        received = self.comm.all_to_all(
            answer.repeat(world_size), [answer.numel()] * world_size, [size_of(l) for l in likes]
        )
        flags = [flag_of(r, expected) for r, expected in zip(received, likes, strict=True)]
        require_finite([torch.stack(flags)])
        return {
            s: payload
            for rank in range(world_size)
            for s, payload in zip(
                self._served[rank], decode(received[rank], likes[rank]), strict=True
            )
        }

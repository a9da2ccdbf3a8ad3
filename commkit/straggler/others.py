"""The coordinators that are not the first, as the first one sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..runtime.alarm import RankFailure
from ..transport import Message, PeerLost
from .protocol import Kind, ProtocolError
from .receiver import Receiver

if TYPE_CHECKING:
    from .coordinator import Coordinator


class OtherCoordinators:
    """They are told the same in the same order, and asked for what they have of a gradient and of the weights.

    Args:
        coordinator: the first one.
        receiver: of all messages to it.
        hear: takes what comes, of anybody, within so many seconds; gives :meth:`take` what is for here.
    """

    def __init__(
        self, coordinator: Coordinator, receiver: Receiver, hear: Callable[[float], object]
    ) -> None:
        self._coordinator, self._receiver, self._hear = coordinator, receiver, hear
        self._party, self._transport = coordinator.party, coordinator.transport
        self._timeout_s = coordinator.options.timeout_s
        self._news: dict[int, list[Message]] = {rank: [] for rank in self._party.others}

    def tell(self, news: Message) -> None:
        """
        Raises:
            RankFailure: one of them is lost.
        """
        for rank in self._party.others:
            try:
                self._transport.isend(rank, news)
            except PeerLost as error:
                raise part_lost(error) from error

    def take(self, rank: int, news: Message) -> None:
        """What one of them has sent, until it is asked for."""
        self._news[rank].append(news)

    def norms(self, own: Tensor) -> Tensor:
        """Those of :class:`Outcome`, of all parts, with parameters in the model's order, so that sums do not depend on
        who holds them."""
        if not self._party.others:
            return own
        columns = dict(zip(self._coordinator.names, own.T, strict=True))
        for rank in self._party.others:
            (news,) = self._next_of(rank, Kind.NORMS).tensors
            columns |= dict(zip(self._party.parts[rank], news.T, strict=True))
        return torch.stack([columns[name] for name in self._party.parameters], dim=1)

    def take_parts(self) -> None:
        """All their weights, into the first one's models."""
        for rank in self._party.others:
            self._coordinator.take_part(rank, self._next_of(rank, Kind.PART).tensors)
        self._coordinator.write_buffers()

    def _next_of(self, rank: int, kind: Kind) -> Message:
        """The next message of one of them; what workers send meanwhile is taken, too."""
        end = self._transport.now() + self._timeout_s
        while not self._news[rank]:
            if rank not in self._receiver.ranks:
                raise RankFailure(
                    f"coordinator rank {rank} has left without its part of the weights"
                )
            left = end - self._transport.now()
            if left <= 0:
                raise TimeoutError(
                    f"coordinator rank {rank} sent nothing for timeout_s={self._timeout_s:g} s"
                )
            self._hear(left)
        news = self._news[rank].pop(0)
        if news.kind != kind:
            raise ProtocolError(rank, news, self._coordinator.rounds.number)
        return news


def part_lost(error: PeerLost) -> RankFailure:
    """What the loss of one of them comes to."""
    return RankFailure(f"{error}; it held a part of the weights")

"""The loop of a server that is not the first: it does what the first one says, in the order in which it says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...runtime.alarm import RankFailure
from ...transport import Message, PeerLost, Pending
from .protocol import Kind, Stop, message
from .stats import PushRecord

if TYPE_CHECKING:
    from .server import AsyncServer, OnPush


class Follower:
    """
    Args:
        server: whose rule and transport it drives.
        on_push: see :meth:`AsyncServer.serve`.
    """

    def __init__(self, server: AsyncServer, on_push: OnPush | None) -> None:
        self._server = server
        self._party = server.party
        self._rule = server.rule
        self._transport = server.transport
        self._on_push = on_push
        self._parts: dict[int, Message] = {}  # of pushes, by lease, until the first server decides
        self._dropped: set[int] = set()  # decided before they came
        self._pending: dict[int, Pending] = {}
        self._last: list[Pending] = []  # final weights on their way

    def run(self) -> None:
        for rank in (self._party.first, *self._party.workers):
            self._pending[rank] = self._transport.irecv(rank)
        timeout_s = self._server.options.timeout_s
        while True:
            ranks = list(self._pending)
            ready = self._transport.wait_some([self._pending[rank] for rank in ranks], timeout_s)
            if not ready:
                raise TimeoutError(
                    f"rank {self._party.first} and the workers sent nothing for timeout_s={timeout_s:g} s"
                )
            for rank in [ranks[place] for place in ready]:
                news = self._hear(rank)
                if news is not None and news.kind == Kind.DONE:
                    self._transport.wait_all(self._last, timeout_s)
                    return

    def _hear(self, rank: int) -> Message | None:
        try:
            news = self._pending[rank].result()
        except PeerLost as error:
            del self._pending[rank]
            if rank == self._party.first:
                raise RankFailure(str(error)) from error
            self._say(message(Kind.GONE, rank))
            return None
        self._pending[rank] = self._transport.irecv(rank)
        if rank != self._party.first:
            self._keep(news)
        else:
            self._obey(news)
        return news

    def _keep(self, push: Message) -> None:
        if push.sequence in self._dropped:
            self._dropped.discard(push.sequence)
        else:
            self._parts[push.sequence] = push
            self._say(message(Kind.GOT, push.sequence))

    def _obey(self, news: Message) -> None:
        if news.kind == Kind.ORDER:
            self._apply(news)
        elif news.kind == Kind.DROP:
            if self._parts.pop(news.sequence, None) is None:
                self._dropped.add(news.sequence)
        elif news.kind == Kind.HAND:
            self._hand_out(news)

    def _apply(self, order: Message) -> None:
        record = PushRecord.unpack(order.tensors[0])
        push = self._parts.pop(order.sequence)
        delta = self._party.codec.decode(push.tensors[1:], self._server.names, order.sequence)
        if not self._rule.push(delta, record.staleness) or self._rule.version != record.version:
            raise RuntimeError(
                f"push {record.number}, of rank {record.worker}, was accepted by rank {self._party.first} but not "
                "here, so the parts of the weights no longer belong together; resume from a checkpoint"
            )
        self._server.stats.count(record)
        if self._on_push is not None:
            self._on_push(record)

    def _hand_out(self, news: Message) -> None:
        worker, stop = news.tensors[0].tolist()
        if stop != Stop.NO:
            self._rule.flush()
        if self._rule.version != news.version:
            raise RuntimeError(
                f"rank {self._party.first} hands out version {news.version} of the weights, here it is "
                f"{self._rule.version}; resume all servers from checkpoints of the same push"
            )
        part = message(Kind.PART, news.sequence, news.version, self._server.outgoing())
        try:
            sending = self._transport.isend(worker, part)
        except PeerLost:
            return  # the first server will hear of it
        if stop == Stop.WAITED_FOR:
            self._last.append(sending)

    def _say(self, news: Message) -> None:
        try:
            self._transport.isend(self._party.first, news)
        except PeerLost:
            pass  # why, its next message says

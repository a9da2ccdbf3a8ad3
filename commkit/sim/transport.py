"""A transport between threads of one process: messages are encoded, queued and lost as on a network, in no time."""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import Any

from ..transport import PeerLost
from ..transport.mailboxes import Mailbox, Mailboxes

_FAREWELL_S = 5.0
_PATIENCE_S = 30.0  # with ranks that do not come


class ThreadNetwork:
    """Ranks that are threads; each takes its own :meth:`at`.

    Args:
        world_size: how many.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.changed = threading.Condition()
        self.transports: dict[int, ThreadTransport] = {}
        self._objects: dict[int, Any] = {}
        self._barrier = threading.Barrier(world_size, timeout=_PATIENCE_S)

    def at(self, rank: int) -> RankOfNetwork:
        return RankOfNetwork(self, rank)

    def gather(self, rank: int, obj: Any) -> list[Any]:
        self._barrier.wait()
        self._objects[rank] = obj
        self._barrier.wait()
        told = [self._objects[r] for r in range(self.world_size)]
        self._barrier.wait()
        return told

    def enter(self, transport: ThreadTransport) -> None:
        """The transport is there for the others once all are."""
        self.transports[transport.rank] = transport
        self._barrier.wait()

    def move(self) -> None:
        """Deliver what can be delivered; under the lock."""
        moved = True
        while moved:
            moved = any(
                source.deliver(box, peer)
                for source in self.transports.values()
                for peer, box in source.boxes.items()
            )


class RankOfNetwork:
    """:class:`~commkit.transport.Network` as one thread sees it."""

    def __init__(self, network: ThreadNetwork, rank: int) -> None:
        self.network, self.rank, self.world_size = network, rank, network.world_size

    def all_gather_object(self, obj: Any) -> list[Any]:
        return self.network.gather(self.rank, obj)

    def open(self, *, peers: Collection[int] | None = None, queue_size: int = 8) -> ThreadTransport:
        return ThreadTransport(self.network, self.rank, peers, queue_size)


class ThreadTransport(Mailboxes):
    """:class:`~commkit.transport.Transport` between threads. Made by :meth:`RankOfNetwork.open`, by all together."""

    def __init__(
        self, network: ThreadNetwork, rank: int, peers: Collection[int] | None, queue_size: int
    ) -> None:
        super().__init__(rank, network.world_size, peers, queue_size, _FAREWELL_S)
        self._network = network
        self._changed = network.changed
        network.enter(self)

    @property
    def boxes(self) -> dict[int, Mailbox]:
        return self._boxes

    def deliver(self, box: Mailbox, peer: int) -> bool:
        """Hand the next message to ``peer``, if it takes it; whether anything went."""
        target = self._network.transports[peer]
        there = target.boxes.get(self.rank)
        if not box.outbox or there is None:
            return False
        if len(there.inbox) >= target.queue_size and not target._closing:
            return False
        sending = box.outbox.popleft()
        box.said_bye = sending.is_farewell
        self._gone(box, sending, 0.0)
        lost = target._arrived(self.rank, sending.header.clone(), sending.body.clone())
        if lost is not None:
            target._lose(there, lost)
        return True

    def die(self) -> None:
        """As if the process were killed: nothing more goes out, and the others lose it."""
        with self._changed:
            self._closing = True
            for box in self._boxes.values():
                box.outbox.clear()
                self._lose(box, PeerLost(self.rank, "this rank was killed"))
                box.outbox.clear()
            for peer in self._boxes:
                target = self._network.transports[peer]
                there = target.boxes.get(self.rank)
                if there is not None and there.lost is None:
                    target._lose(there, PeerLost(self.rank, "its thread was killed"))
            self._changed.notify_all()

    def _stir(self) -> None:
        self._network.move()
        super()._stir()

    def _break_off(self) -> None:
        with self._changed:
            self._network.move()

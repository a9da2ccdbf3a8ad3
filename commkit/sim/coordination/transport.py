"""A transport between processes that take turns: messages take their time, and end with their sender."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ...transport import PeerLost
from ...transport.mailboxes import Mailbox, Mailboxes, Sending
from ..membership.network import VirtualNetwork
from ..processes.turns import News, Process, Turns

_CLOSE_S = 5.0
_FULL_S = 0.05


class Ranks:
    """Those who meet.

    Args:
        world_size: how many.
    """

    def __init__(self, world_size: int, turns: Turns, network: VirtualNetwork) -> None:
        self.world_size, self.turns, self.network = world_size, turns, network
        self.transports: dict[int, VirtualTransport] = {}
        self.told: list[dict[int, Any]] = []

    def at(self, rank: int, process: Process) -> RankOf:
        return RankOf(self, rank, process)


class RankOf:
    """:class:`~commkit.transport.Network` as one process sees it."""

    def __init__(self, ranks: Ranks, rank: int, process: Process) -> None:
        self.rank, self.world_size = rank, ranks.world_size
        self._ranks, self._process, self._calls = ranks, process, 0

    def all_gather_object(self, obj: Any) -> list[Any]:
        ranks = self._ranks
        if self._calls == len(ranks.told):
            ranks.told.append({})
        told = ranks.told[self._calls]
        self._calls += 1
        told[self.rank] = obj
        ranks.turns.wait(lambda: len(told) == ranks.world_size)
        return [told[rank] for rank in range(ranks.world_size)]

    def open(
        self, *, peers: Collection[int] | None = None, queue_size: int = 8
    ) -> VirtualTransport:
        ranks = self._ranks
        made = VirtualTransport(ranks, self.rank, self._process, peers, queue_size)
        ranks.transports[self.rank] = made
        ranks.turns.wait(lambda: len(ranks.transports) == ranks.world_size)
        return made


class VirtualTransport(Mailboxes):
    """Made by :meth:`RankOf.open`."""

    def __init__(
        self,
        ranks: Ranks,
        rank: int,
        process: Process,
        peers: Collection[int] | None,
        queue_size: int,
    ) -> None:
        super().__init__(rank, ranks.world_size, peers, queue_size, _CLOSE_S)
        self._ranks, self._process = ranks, process
        self._changed: Any = News(ranks.turns)

    def now(self) -> float:
        return self._ranks.network.clock.now

    def die(self) -> None:
        """Its process has ended; its system says so to the others."""
        for peer in self._boxes:
            self._after(lambda peer=peer: self._ranks.transports[peer].lose(self._rank))

    def lose(self, peer: int) -> None:
        """The connection to ``peer`` has broken."""
        box = self._boxes.get(peer)
        if box is not None and box.lost is None:
            self._lose(box, PeerLost(peer, "its process has ended"))

    def _after(self, call: Any, seconds: float | None = None) -> None:
        network = self._ranks.network
        delay = network.random.expovariate(1 / network.slowness_s) if seconds is None else seconds
        network.clock.after(delay, call)

    def _stir(self) -> None:
        """One message at a time is on its way to each peer."""
        super()._stir()
        if self._process.dead:
            return
        for peer, box in self._boxes.items():
            if box.outbox and not box.sending:
                box.sending = True
                sending = box.outbox.popleft()
                box.said_bye = sending.is_farewell
                self._after(lambda p=peer, b=box, s=sending: self._deliver(p, b, s))

    def _deliver(self, peer: int, box: Mailbox, sending: Sending) -> None:
        target = self._ranks.transports[peer]
        there = target._boxes.get(self._rank)
        if there is None or target._process.dead or there.lost is not None:
            self._gone(box, sending, 0.0)
        elif self._process.dead and self._ranks.network.random.random() < 0.5:
            return
        elif len(there.inbox) >= target.queue_size and not target._closing:
            self._after(lambda: self._deliver(peer, box, sending), _FULL_S)
            return
        else:
            self._gone(box, sending, 0.0)
            lost = target._arrived(self._rank, sending.header.clone(), sending.body.clone())
            if lost is not None:
                target._lose(there, lost)
                target._stir()
        self._stir()

    def _break_off(self) -> None: ...

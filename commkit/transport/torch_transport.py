"""Point-to-point messages over torch.distributed: one blocking thread per peer and direction.

On gloo a polled ``irecv`` never completes, and a wait that expires breaks the connections to all peers of the
group. So nobody polls and no wait expires: threads block in a group of their own that has no time limit, and
hand over what comes. A peer whose process ends is noticed by its two threads alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from ..comm import DistComm, require_group
from .base import PeerLost
from .mailboxes import Mailbox, Mailboxes, first_line
from .wire import HEADER, body_bytes

_FOREVER = timedelta(days=3650)
_BREAK_TAG = 1  # of a receive that nobody serves
_opened: dict[str, int] = {}  # transports made so far, by the name of their group


class TorchTransport(Mailboxes):
    """:class:`~commkit.transport.Transport` over the ranks of a process group.

    It makes a group of its own, of which only it may know. Tensors travel through host memory; what arrives
    is on the CPU.

    Args:
        group: the ranks; None is the default group. All of them make a transport together: collective.
        peers: the ranks (of the group) to talk to, each of which must list this one; None is everybody. Each
            costs two threads.
        queue_size: messages per peer that wait to be sent before :meth:`isend` refuses, and that are kept
            unclaimed before this side stops taking them (then the sender's queue fills).
        connect_s: how long to wait for the other ranks.
        close_s: how long :meth:`close` gives the peers to take what is queued.

    Raises:
        ValueError: a queue of no size, or a peer that is not of the group.
        TimeoutError: ranks that did not come; they are named.
        RuntimeError: no process group.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        peers: Collection[int] | None = None,
        queue_size: int = 8,
        connect_s: float = 60.0,
        close_s: float = 5.0,
    ) -> None:
        group = require_group(group)
        super().__init__(
            dist.get_rank(group), dist.get_world_size(group), peers, queue_size, close_s
        )
        self._threads: list[threading.Thread] = []
        self._group = _open_group(group, connect_s)
        for peer, box in self._boxes.items():
            for body in (self._receive, self._send):
                name = f"commkit-transport-{body.__name__.strip('_')}-{peer}"
                thread = threading.Thread(target=body, args=(peer, box), name=name, daemon=True)
                self._threads.append(thread)
                thread.start()

    def _receive(self, peer: int, box: Mailbox) -> None:
        """The thread that takes what ``peer`` sends, to its end."""
        lost = self._receive_all(peer, box)
        with self._changed:
            self._lose(box, lost)

    def _receive_all(self, peer: int, box: Mailbox) -> PeerLost:
        header = torch.empty(HEADER, dtype=torch.int64)
        while True:
            try:
                dist.recv(header, group=self._group, group_src=peer)
                body = torch.empty(body_bytes(header), dtype=torch.uint8)
                if body.numel():
                    dist.recv(body, group=self._group, group_src=peer)
            except (RuntimeError, ValueError) as error:
                return PeerLost(peer, first_line(error))
            with self._changed:
                lost = self._arrived(peer, header, body)
                if lost is not None:
                    return lost
                while len(box.inbox) >= self.queue_size and not self._closing:
                    self._changed.wait()

    def _send(self, peer: int, box: Mailbox) -> None:
        """The thread that sends to ``peer``, until a farewell has gone or the peer has."""
        while True:
            with self._changed:
                while not box.outbox:
                    if box.lost is not None:
                        return
                    self._changed.wait()
                sending = box.outbox.popleft()
                box.sending = True
                box.said_bye = sending.is_farewell
            start = time.perf_counter()
            error: RuntimeError | None = None
            try:
                for part in (sending.header, sending.body):
                    if part.numel():
                        dist.send(part, group=self._group, group_dst=peer)
            except RuntimeError as failure:
                error = failure
            with self._changed:
                if error is None:
                    self._gone(box, sending, time.perf_counter() - start)
                else:
                    self._failed(peer, sending, first_line(error))
                if sending.is_farewell:
                    return

    def _break_off(self) -> None:
        """Wake up threads that wait for peers which neither live nor die: an expired wait closes every
        connection of the group, which is to end anyway."""
        for peer in self._boxes:
            if not any(t.is_alive() for t in self._threads if t.name.endswith(f"-{peer}")):
                continue
            try:
                nothing = torch.empty(1)
                work = dist.irecv(nothing, group=self._group, group_src=peer, tag=_BREAK_TAG)
                if work is not None:
                    work.wait(timedelta(milliseconds=1))
            except RuntimeError:
                pass  # as intended, or the peer was gone already
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(1.0)


class TorchNetwork:
    """:class:`~commkit.transport.Network` of a process group; None is the default group.

    Raises:
        RuntimeError: torch.distributed is not initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = require_group(group)
        self.rank, self.world_size = dist.get_rank(self.group), dist.get_world_size(self.group)

    def all_gather_object(self, obj: Any) -> list[Any]:
        return DistComm(self.group).all_gather_object(obj)

    def open(self, *, peers: Collection[int] | None = None, queue_size: int = 8) -> TorchTransport:
        return TorchTransport(self.group, peers=peers, queue_size=queue_size)


def _open_group(group: dist.ProcessGroup, connect_s: float) -> dist.ProcessGroup:
    """A group without a time limit over the ranks of ``group``. First they find each other through the store:
    without a time limit nobody could say who is missing."""
    turn = _opened[group.group_name] = _opened.get(group.group_name, 0) + 1
    backend = dist.get_backend(group)
    members = dist.get_process_group_ranks(group)
    rank = dist.get_rank(group)
    store = _get_default_store().clone()  # type: ignore[attr-defined]
    keys = [f"commkit/transport/{group.group_name}/{turn}/{r}" for r in range(len(members))]
    store.set(keys[rank], backend)
    missing = list(range(len(members)))
    end = time.monotonic() + connect_s
    while missing:
        missing = [r for r in missing if not store.check([keys[r]])]
        if missing and time.monotonic() > end:
            raise TimeoutError(
                f"ranks {missing} made no transport within connect_s={connect_s:g} s; make it on all ranks of the "
                "group, in the same order"
            )
        if missing:
            time.sleep(0.02)
    created = dist.new_group(
        ranks=members, timeout=_FOREVER, backend="gloo", use_local_synchronization=True
    )
    assert isinstance(created, dist.ProcessGroup)
    return created

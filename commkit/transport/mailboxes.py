"""What every transport does alike: claims, queues, ends. How bytes move is the business of its sub-classes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ..types import ByteCounter
from .base import (
    Message,
    PeerClosed,
    PeerFailed,
    PeerLost,
    Pending,
    TransportClosed,
    TransportFull,
)
from .wire import HEADER_BYTES, decode, encode

BYE, FAILED = -1, -2  # kinds of the transport's own


class Slot:
    """A pending message of either direction; all its changes happen under the transport's lock."""

    __slots__ = ("error", "message")

    def __init__(self, message: Message | None = None) -> None:
        self.message = message
        self.error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.message is not None or self.error is not None

    def result(self) -> Message:
        if self.error is not None:
            raise self.error
        if self.message is None:
            raise RuntimeError("the message is still under way; ask wait_some() first")
        return self.message


class Sending(Slot):
    """A message on its way out: done when the network has taken it.

    Raises:
        TypeError: a dtype that cannot be sent.
    """

    __slots__ = ("body", "gone", "header")

    def __init__(self, message: Message) -> None:
        super().__init__(message)
        self.header, self.body = encode(message)
        self.gone = False

    @property
    def done(self) -> bool:
        return self.gone or self.error is not None

    @property
    def is_farewell(self) -> bool:
        assert self.message is not None
        return self.message.kind < 0


class Mailbox:
    """Both directions to one rank."""

    def __init__(self) -> None:
        self.inbox: deque[Message] = deque()
        self.claims: deque[Slot] = deque()
        self.outbox: deque[Sending] = deque()
        self.lost: PeerLost | None = None
        self.said_bye = self.sending = False


class Mailboxes:
    """The part of a :class:`~commkit.transport.Transport` that does not know how bytes move.

    A sub-class takes from ``outbox``, hands over with ``_arrived`` and ``_gone``, says ``_lose`` when nothing more can
    come, all under the lock of ``_changed``, and ends in ``_break_off``.

    Args:
        rank: of this process.
        world_size: ranks in the group.
        peers: the ranks to talk to; None is everybody.
        queue_size: see the sub-classes.
        close_s: see the sub-classes.

    Raises:
        ValueError: a queue of no size, or a peer that is not of the group.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        peers: Collection[int] | None,
        queue_size: int,
        close_s: float,
    ) -> None:
        if queue_size < 1:
            raise ValueError(f"queue_size={queue_size} must be >= 1; use 8")
        self._rank, self._world_size = rank, world_size
        others = set(range(world_size)) - {rank}
        chosen = others if peers is None else set(peers)
        if not chosen <= others:
            raise ValueError(
                f"peers={sorted(chosen)} must be other ranks of the group, {sorted(others)}"
            )
        self.queue_size, self.close_s = queue_size, close_s
        self._changed = threading.Condition()
        self._sent = ByteCounter()
        self._closing = False
        self._boxes = {peer: Mailbox() for peer in sorted(chosen)}

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    @property
    def sent(self) -> ByteCounter:
        with self._changed:
            return self._sent.copy()

    def now(self) -> float:
        """As :meth:`Transport.now`."""
        return time.monotonic()

    def isend(self, peer: int, message: Message) -> Pending:
        """As :meth:`Transport.isend`; an endless backlog is a ``TransportFull``, not a wait.

        Raises:
            ValueError: a ``kind`` below 0, or a rank that is not among the peers.
            PeerLost, TransportFull, TransportClosed: see there.
        """
        if message.kind < 0:
            raise ValueError(f"kind={message.kind} must be >= 0; others are the transport's own")
        box = self._box(peer)
        sending = Sending(message)
        with self._changed:
            if self._closing:
                raise TransportClosed("the transport was closed")
            if box.lost is not None:
                raise box.lost
            if len(box.outbox) >= self.queue_size:
                raise TransportFull(
                    f"{len(box.outbox)} messages wait to be sent to rank {peer}, which does not take them; wait "
                    f"for earlier ones, or raise queue_size={self.queue_size}"
                )
            box.outbox.append(sending)
            self._stir()
        return sending

    def irecv(self, peer: int) -> Pending:
        """As :meth:`Transport.irecv`. What arrived before a peer was lost is delivered first.

        Raises:
            ValueError: a rank that is not among the peers.
        """
        box = self._box(peer)
        slot = Slot()
        with self._changed:
            box.claims.append(slot)
            self._match(box)
            self._stir()
        return slot

    def wait_some(self, pending: Sequence[Pending], deadline_s: float) -> list[int]:
        """As :meth:`Transport.wait_some`."""
        end = self.now() + deadline_s
        with self._changed:
            while True:
                done = [place for place, one in enumerate(pending) if one.done]
                left = end - self.now()
                if done or left <= 0:
                    return done
                self._pause(min(left, threading.TIMEOUT_MAX))

    def wait_all(self, pending: Sequence[Pending], deadline_s: float) -> bool:
        """As :meth:`Transport.wait_all`."""
        end = self.now() + deadline_s
        while left := [one for one in pending if not one.done]:
            if not self.wait_some(left, end - self.now()):
                return False
        return True

    def close(self, error: str | None = None) -> None:
        """As :meth:`Transport.close`; a second call does nothing. Takes at most about ``close_s`` seconds, which
        only a peer that neither lives nor dies needs."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            for box in self._boxes.values():
                if box.lost is None:
                    box.outbox.append(farewell(error))
                for slot in box.claims:
                    slot.error = TransportClosed("the transport was closed")
                box.claims.clear()
            self._stir()
            end = self.now() + self.close_s
            while any(b.lost is None or b.sending or b.outbox for b in self._boxes.values()):
                left = end - self.now()
                if left <= 0:
                    break
                self._pause(left)
        self._break_off()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.close(None if error is None else f"{type(error).__name__}: {error}")

    # What sub-classes fill in.

    def _stir(self) -> None:
        """Something can be sent or received that could not be before; under the lock."""
        self._changed.notify_all()

    def _pause(self, seconds: float) -> None:
        """Wait until something changes, or for so long; under the lock, which others may take meanwhile."""
        self._changed.wait(seconds)

    def _break_off(self) -> None:
        """Release what still waits for peers that neither live nor die."""
        raise NotImplementedError

    # What sub-classes call, under the lock.

    def _arrived(self, peer: int, header: Tensor, body: Tensor) -> PeerLost | None:
        """Take a message in; if it was the last, what became of the peer."""
        message = decode(header, body)
        if message.kind == FAILED:
            return PeerFailed(peer, bytes(message.tensors[0].tolist()).decode())
        if message.kind == BYE:
            return PeerClosed(peer, "it closed its transport")
        box = self._boxes[peer]
        box.inbox.append(message)
        self._match(box)
        self._changed.notify_all()
        return None

    def _gone(self, box: Mailbox, sending: Sending, seconds: float) -> None:
        """The network has taken ``sending``."""
        box.sending = False
        sending.gone = True
        if not sending.is_farewell:
            assert sending.message is not None
            payload = sum(x.numel() * x.element_size() for x in sending.message.tensors)
            self._sent.add("send", payload, HEADER_BYTES + sending.body.numel(), seconds)
        self._changed.notify_all()

    def _failed(self, peer: int, sending: Sending, reason: str) -> None:
        """The network could not take ``sending``."""
        box = self._boxes[peer]
        box.sending = False
        self._lose(box, PeerLost(peer, reason))
        sending.error = box.lost

    def _lose(self, box: Mailbox, lost: PeerLost) -> None:
        """The peer is gone, as far as we are concerned. The first reason counts, but a connection that breaks in
        one direction may still deliver the true reason in the other."""
        if box.lost is None or (type(box.lost) is PeerLost and type(lost) is not PeerLost):
            box.lost = lost
        for sending in box.outbox:
            sending.error = box.lost
        box.outbox.clear()
        if isinstance(lost, PeerClosed | PeerFailed) and not box.said_bye:
            box.outbox.append(farewell(None))  # which frees its receiver
        self._match(box)
        self._changed.notify_all()

    # How it is done.

    def _box(self, peer: int) -> Mailbox:
        if peer not in self._boxes:
            raise ValueError(f"rank {peer} is not among the peers {sorted(self._boxes)}")
        return self._boxes[peer]

    def _match(self, box: Mailbox) -> None:
        """Hand messages to those who have claimed them."""
        while box.claims and box.inbox:
            box.claims.popleft().message = box.inbox.popleft()
        if box.claims and (box.lost is not None or self._closing):
            for slot in box.claims:
                slot.error = box.lost or TransportClosed("the transport was closed")
            box.claims.clear()


def farewell(error: str | None) -> Sending:
    """The last message to a peer, with the error that ends us if there is one."""
    if error is None:
        return Sending(Message(BYE))
    text = torch.tensor(list(error.encode()), dtype=torch.uint8)
    return Sending(Message(FAILED, tensors=(text,)))


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

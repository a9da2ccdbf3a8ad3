"""What point-to-point code may ask of a transport, and how it hears that a peer is gone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..types import ByteCounter


@dataclass(frozen=True, slots=True)
class Message:
    """Tensors from one rank to another, and three integers that say what they are.

    Args:
        kind: of the message, >= 0; its meaning is the users'.
        sequence: a number of the users', such as a step or a lease.
        version: another one, such as that of the weights.
        tensors: of any dtype and shape; any number of them.
    """

    kind: int
    sequence: int = 0
    version: int = 0
    tensors: tuple[Tensor, ...] = ()


class PeerLost(RuntimeError):
    """Nothing more comes from ``peer``, and nothing reaches it: its connection broke, as it does within a
    fraction of a second when its process ends. Other peers are not concerned."""

    what = "is lost"

    def __init__(self, peer: int, reason: str) -> None:
        super().__init__(f"rank {peer} {self.what}: {reason}")
        self.peer = peer
        self.reason = reason


class PeerClosed(PeerLost):
    """``peer`` has closed its transport in good order."""

    what = "has left"


class PeerFailed(PeerLost):
    """``peer`` has closed its transport because of an error of its own, which is the ``reason``."""

    what = "failed"


class TransportClosed(RuntimeError):
    """This rank's own transport was closed."""


class TransportFull(RuntimeError):
    """A peer does not take what is sent to it, and no more is queued."""


class Pending(Protocol):
    """A message under way, in one direction."""

    @property
    def done(self) -> bool:
        """Whether :meth:`result` has something to say. Never blocks."""

    def result(self) -> Message:
        """The message that came, or that went.

        Raises:
            PeerLost: it will not.
            TransportClosed: it will not, because this side was closed.
            RuntimeError: not done yet.
        """


class Transport(Protocol):
    """Point-to-point messages over one group of ranks. Messages of one peer arrive in the order in which they
    were sent; peers do not wait for each other. Every method may be called from any thread."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def sent(self) -> ByteCounter:
        """What this rank has sent, headers included in ``wire_bytes`` alone."""

    def now(self) -> float:
        """Seconds of the clock by which deadlines go."""

    def isend(self, peer: int, message: Message) -> Pending:
        """Send; returns at once. Tensors are copied first, so they may be changed afterwards.

        Raises:
            PeerLost: ``peer`` is gone.
            TransportFull: it does not take what was sent before.
        """

    def irecv(self, peer: int) -> Pending:
        """Claim the next message from ``peer`` that nobody has claimed; returns at once."""

    def wait_some(self, pending: Sequence[Pending], deadline_s: float) -> list[int]:
        """Wait until one or more of ``pending`` are done, for at most ``deadline_s`` seconds from now.

        Returns:
            The places in ``pending`` of those that are done, in ascending order; empty at the deadline.
        """

    def wait_all(self, pending: Sequence[Pending], deadline_s: float) -> bool:
        """Wait until all of ``pending`` are done; False if they are not after ``deadline_s`` seconds."""

    def close(self, error: str | None = None) -> None:
        """Send what is queued, say goodbye, and end. With ``error``, every peer gets :class:`PeerFailed`."""


class Network(Protocol):
    """Some ranks before they have a transport: who is there, and what they agree on."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Small picklable objects of all ranks, in rank order. Collective."""

    def open(self, *, peers: Collection[int] | None = None, queue_size: int = 8) -> Transport:
        """A transport of its own between all ranks. Collective."""

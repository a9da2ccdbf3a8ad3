"""What coordinators have sent to a worker."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ..runtime.alarm import RankFailure
from ..transport import Message, PeerLost, Transport, TransportClosed
from .receiver import Receiver


class Inbox:
    """Messages that have come and were not taken, in the order of each coordinator; they are taken one of each at a time,
    as what they send belongs together.

    Args:
        transport: started.
        ranks: of the coordinators.
        timeout_s: after which silence is an error.
    """

    def __init__(self, transport: Transport, ranks: Sequence[int], timeout_s: float) -> None:
        self._transport, self._timeout_s = transport, timeout_s
        self._receiver = Receiver(transport, ranks)
        self._boxes: dict[int, deque[Message]] = {rank: deque() for rank in ranks}
        self._failures: dict[int, Exception] = {}

    def __getitem__(self, rank: int) -> Sequence[Message]:
        """Those of one rank, the oldest first."""
        return self._boxes[rank]

    @property
    def has_failed(self) -> bool:
        """Whether nothing more will come of some coordinator."""
        return bool(self._failures)

    def look(self) -> None:
        """Take in what is there."""
        for rank in self._receiver.ranks:
            try:
                while self._receiver.is_ready(rank):
                    self._boxes[rank].append(self._receiver.take(rank))
            except (PeerLost, TransportClosed) as error:
                self._failures[rank] = error

    def wait(self) -> None:
        """Until there is something of every coordinator.

        Raises:
            RankFailure: there will not be.
            TimeoutError: it takes too long; who is awaited is named.
        """
        end = self._transport.now() + self._timeout_s
        while True:
            self.look()
            waiting = [rank for rank, box in self._boxes.items() if not box]
            lost = [rank for rank in waiting if rank in self._failures]
            if lost:
                failure = self._failures[lost[0]]
                raise RankFailure(str(failure)) from failure
            if not waiting:
                return
            if not self._receiver.wait(waiting, end - self._transport.now()):
                raise TimeoutError(
                    f"coordinator rank {waiting[0]} sent nothing for timeout_s={self._timeout_s:g} s; look at "
                    "it, or raise the limit"
                )

    def pop(self) -> dict[int, Message] | None:
        """The oldest message of each coordinator; None: one of them is not here yet."""
        if not all(self._boxes.values()):
            return None
        return {rank: box.popleft() for rank, box in self._boxes.items()}

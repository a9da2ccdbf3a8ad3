"""The next message of each of several ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..transport import Message, PeerLost, Pending, Transport, TransportClosed


class Receiver:
    """Has one receive under way from each rank, and begins the next when its message is taken.

    Args:
        transport: started.
        ranks: to hear.
    """

    def __init__(self, transport: Transport, ranks: Iterable[int]) -> None:
        self._transport = transport
        self._pending: dict[int, Pending] = {rank: transport.irecv(rank) for rank in ranks}

    @property
    def ranks(self) -> list[int]:
        """Of whom something may still come."""
        return list(self._pending)

    def is_ready(self, rank: int) -> bool:
        """Whether :meth:`take` has something to say."""
        return self._pending[rank].done

    def wait(self, ranks: Sequence[int], seconds: float) -> list[int]:
        """Until something has come of any of ``ranks``, for at most so many seconds; of whom it has."""
        ready = self._transport.wait_some([self._pending[rank] for rank in ranks], seconds)
        return [ranks[place] for place in ready]

    def take(self, rank: int) -> Message:
        """What has come of this rank.

        Raises:
            PeerLost, TransportClosed: nothing more will, and it is no longer among :attr:`ranks`.
        """
        try:
            news = self._pending[rank].result()
        except (PeerLost, TransportClosed):
            del self._pending[rank]
            raise
        self._pending[rank] = self._transport.irecv(rank)
        return news

"""How much a rank sends from one record to the next."""

from typing import NamedTuple

from commkit.transport import Transport
from commkit.types import ByteCounter


class Sent(NamedTuple):
    """As :class:`~commkit.types.ByteCounter`, of a while."""

    payload_bytes: int
    wire_bytes: int
    rounds: int
    seconds: float


class Traffic:
    """Of a transport, from its beginning."""

    def __init__(self, transport: Transport) -> None:
        self._transport, self._before = transport, ByteCounter()

    def since_last(self) -> Sent:
        """What was sent since this was last asked."""
        before, now = self._before, self._transport.sent
        self._before = now
        return Sent(
            now.payload_bytes - before.payload_bytes,
            now.wire_bytes - before.wire_bytes,
            now.rounds - before.rounds,
            now.seconds - before.seconds,
        )

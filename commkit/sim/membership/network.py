"""Messages that take their time, arrive out of order or twice, and wait where a link is cut."""

from __future__ import annotations

import random
from collections.abc import Callable

from ..clock import VirtualClock

STORE = "store"
_RETRY_S = 0.2


class VirtualNetwork:
    """
    Args:
        clock: of the run.
        random: decides all delays.
        slowness_s: the mean delay of a message.

    Attributes:
        cut: (from, to) of links that carry nothing now; messages wait until they do again, as TCP's do.
    """

    def __init__(self, clock: VirtualClock, random: random.Random, slowness_s: float) -> None:
        self.clock = clock
        self.random = random
        self.cut: set[tuple[str, str]] = set()
        self._slowness_s = slowness_s

    def send(
        self, source: str, target: str, arrive: Callable[[], None], twice: float = 0.0
    ) -> None:
        """``arrive`` is called when the message does; with probability ``twice``, two times."""
        for _ in range(1 + (self.random.random() < twice)):
            self.clock.after(
                self.random.expovariate(1 / self._slowness_s),
                lambda: self._deliver(source, target, arrive),
            )

    def _deliver(self, source: str, target: str, arrive: Callable[[], None]) -> None:
        if (source, target) in self.cut:
            self.clock.after(_RETRY_S, lambda: self._deliver(source, target, arrive))
        else:
            arrive()


class VirtualStore:
    """What a TCPStore promises: all operations in one order. A request that is sent twice may be carried out twice."""

    def __init__(self, network: VirtualNetwork) -> None:
        self._network = network
        self._log: list[str] = []
        self._beats: dict[str, int] = {}

    def append(
        self, worker: str, position: int, text: str, reply: Callable[[int, str], None]
    ) -> None:
        """Compare and set the log's place; ``reply`` gets what is there then."""

        def arrive() -> None:
            if position == len(self._log) and text:
                self._log.append(text)
            have = self._log[position] if position < len(self._log) else ""
            self._network.send(STORE, worker, lambda: reply(position, have))

        self._network.send(worker, STORE, arrive, twice=0.05)

    def beat(self, worker: str, beat: int, reply: Callable[[dict[str, int]], None]) -> None:
        """Set one sign of life; ``reply`` gets all."""

        def arrive() -> None:
            self._beats[worker] = max(beat, self._beats.get(worker, 0))
            beats = dict(self._beats)
            self._network.send(STORE, worker, lambda: reply(beats))

        self._network.send(worker, STORE, arrive)

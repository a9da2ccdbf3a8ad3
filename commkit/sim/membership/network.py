"""Messages that take their time, arrive out of order or twice, and wait where a link is cut; and the store."""

from __future__ import annotations

import random
from collections.abc import Callable

from ..clock import VirtualClock

STORE = "store"
_RETRY_S = 0.2
_TWICE = 0.05


class VirtualNetwork:
    """
    Args:
        clock: of the run.
        random: decides all delays.
        slowness_s: the mean delay of a message.

    Attributes:
        cut: (from, to) of links that carry nothing now; messages wait until they do again, as TCP's do.
        ended: who has died: half of what it had sent never arrives.
    """

    def __init__(self, clock: VirtualClock, random: random.Random, slowness_s: float) -> None:
        self.clock = clock
        self.random = random
        self.cut: set[tuple[str, str]] = set()
        self.ended: set[str] = set()
        self.slowness_s = slowness_s

    def send(
        self,
        source: str,
        target: str,
        arrive: Callable[[], None],
        twice: float = 0.0,
        sure: bool = False,
    ) -> None:
        """``arrive`` is called when the message does; with probability ``twice``, two times. ``sure``: also if the sender
        dies, as what its system sends for it."""
        for _ in range(1 + (self.random.random() < twice)):
            self.clock.after(
                self.random.expovariate(1 / self.slowness_s),
                lambda: self._deliver(source, target, arrive, sure),
            )

    def _deliver(self, source: str, target: str, arrive: Callable[[], None], sure: bool) -> None:
        if (source, target) in self.cut:
            self.clock.after(_RETRY_S, lambda: self._deliver(source, target, arrive, sure))
        elif sure or source not in self.ended or self.random.random() < 0.5:
            arrive()


class VirtualStore:
    """What a TCPStore promises: all operations in one order. A request that is sent twice may be carried out twice.

    Args:
        network: that leads to it.
        appended: called with a worker and what it has just written to the log, before it knows.

    Attributes:
        lost: its host has died: requests are refused.
    """

    def __init__(
        self, network: VirtualNetwork, appended: Callable[[str, str], None] = lambda *_: None
    ) -> None:
        self.lost = False
        self._network = network
        self._appended = appended
        self._log: list[str] = []
        self._beats: dict[str, int] = {}
        self._resumes = 0.0

    def pause(self, seconds: float) -> None:
        """Its host is stopped for so long; what arrives meanwhile waits."""
        self._resumes = max(self._resumes, self._network.clock.now + seconds)

    def append(
        self,
        worker: str,
        position: int,
        text: str,
        reply: Callable[[int, str], None],
        refused: Callable[[], None],
    ) -> None:
        """Compare and set the log's place; ``reply`` gets what is there then."""

        def carry_out() -> Callable[[], None]:
            if position == len(self._log) and text:
                self._log.append(text)
                self._appended(worker, text)
            have = self._log[position] if position < len(self._log) else ""
            return lambda: reply(position, have)

        self._request(worker, carry_out, refused, _TWICE)

    def beat(
        self,
        worker: str,
        beat: int,
        reply: Callable[[dict[str, int]], None],
        refused: Callable[[], None],
    ) -> None:
        """Set one sign of life; ``reply`` gets all."""

        def carry_out() -> Callable[[], None]:
            self._beats[worker] = max(beat, self._beats.get(worker, 0))
            beats = dict(self._beats)
            return lambda: reply(beats)

        self._request(worker, carry_out, refused)

    def _request(
        self,
        worker: str,
        carry_out: Callable[[], Callable[[], None]],
        refused: Callable[[], None],
        twice: float = 0.0,
    ) -> None:
        clock = self._network.clock

        def arrive() -> None:
            if clock.now < self._resumes:
                jitter = self._network.random.expovariate(1 / self._network.slowness_s)
                clock.after(self._resumes - clock.now + jitter, arrive)
                return
            self._network.send(STORE, worker, refused if self.lost else carry_out())

        self._network.send(worker, STORE, arrive, twice)

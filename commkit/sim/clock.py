"""A clock that jumps from one event to the next."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from itertools import count


class VirtualClock:
    """Calls what is due in the order of time, and of asking where times are equal.

    Attributes:
        now: seconds since the beginning.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call ``call`` so many seconds from now."""
        heapq.heappush(self._due, (self.now + seconds, next(self._numbers), call))

    @property
    def next_due(self) -> float:
        """When the next call is due; inf: none is."""
        return self._due[0][0] if self._due else math.inf

    def run(self, until: float) -> None:
        """Let time pass up to ``until``."""
        while self._due and self._due[0][0] <= until:
            self.now, _, call = heapq.heappop(self._due)
            call()
        self.now = until

"""Signals that end a program must not end it before the lab is gone."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SignalGuard:
    """From ``install`` to ``restore``, signals that would kill raise SystemExit in their stead.

    So ``with`` statements and ``finally`` clauses run. Handlers of others (Python's own for ctrl-C
    is one) are called as before, but not inside :meth:`held`: what comes then waits for
    ``restore``. An ignored signal stays ignored. Outside the main thread, where Python allows no
    handlers, nothing is done.
    """

    def __init__(self) -> None:
        self._previous: dict[signal.Signals, signal._HANDLER] = {}
        self._holding = False
        self._pending: list[int] = []

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in ENDING:
            previous = signal.getsignal(signum)
            if previous not in (signal.SIG_IGN, None):  # None: set by C code, which we cannot call
                self._previous[signum] = previous
                signal.signal(signum, self._handle)

    def restore(self) -> None:
        """Put the handlers back, then deliver what was held back."""
        if threading.current_thread() is threading.main_thread():
            for signum, handler in self._previous.items():
                if signal.getsignal(signum) == self._handle:  # else somebody has replaced ours
                    signal.signal(signum, handler)
        pending, self._pending = self._pending, []
        for number in pending:
            self._deliver(number, None)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nothing interrupts the body."""
        before, self._holding = self._holding, True
        try:
            yield
        finally:
            self._holding = before

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._holding:
            self._pending.append(signum)
        else:
            self._deliver(signum, frame)

    def _deliver(self, signum: int, frame: FrameType | None) -> None:
        previous = self._previous[signal.Signals(signum)]
        if callable(previous):
            previous(signum, frame)
        else:
            raise SystemExit(128 + signum)  # the status that a shell gives a killed program

"""A slow, lossy, or cut network between a worker and the store, in user space: for kernels without ``netem``."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

_TICK_S = 0.02
_READ = 1 << 16


class Relay:
    """Passes on what TCP connections to ``port`` carry.

    Args:
        target: where they lead.
        delay_s: one way.
        loss: share of pieces that are lost, and sent again by TCP: they, and all behind them, come later.
        again_s: how much later; TCP waits 0.2 s at least, or a round trip if more follows.
        seed: of the losses.

    Attributes:
        port: to connect to instead.
        frozen: nothing passes; it does once this is false again.
        frozen_up: nothing passes on the way to the target.
    """

    def __init__(
        self,
        target: int,
        delay_s: float = 0.0,
        loss: float = 0.0,
        again_s: float = 0.3,
        seed: int = 0,
    ) -> None:
        self.frozen = self.frozen_up = False
        self._target, self._delay_s, self._loss, self._again_s = target, delay_s, loss, again_s
        self._chance = random.Random(seed)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                for each in (near, far):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._pump(near, far, lambda: self.frozen or self.frozen_up)
                self._pump(far, near, lambda: self.frozen)

    def _pump(
        self, source: socket.socket, sink: socket.socket, stopped: Callable[[], bool]
    ) -> None:
        way: list[tuple[float, bytes]] = []
        news = threading.Condition()

        def read() -> None:
            data = b"?"
            while data:
                data = b""
                with suppress(OSError):
                    data = source.recv(_READ)
                late = self._again_s if self._chance.random() < self._loss else 0.0
                with news:
                    due = time.monotonic() + self._delay_s + late
                    way.append((max(due, way[-1][0] if way else 0.0), data))
                    news.notify()

        def write() -> None:
            data = b"?"
            while data:
                with news:
                    news.wait_for(lambda: way)
                    due = way[0][0]
                time.sleep(max(0.0, due - time.monotonic()))
                while stopped():
                    time.sleep(_TICK_S)
                with news:
                    data = way.pop(0)[1]
                with suppress(OSError):
                    sink.sendall(data) if data else sink.shutdown(socket.SHUT_WR)

        for body in (read, write):
            threading.Thread(target=body, daemon=True).start()

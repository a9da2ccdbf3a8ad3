"""Calls that wait for other ranks, and are left to themselves when they do so in vain.

Cutting a connection ends whoever waits to receive from it, and nearly always whoever waits to send: gloo forgets to tell
an operation that it had begun to write (``tx_`` of its TCP pairs) when the connection ends, and that one waits for the
group's timeout, half an hour.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import torch

from . import connections
from .connections import ConnectionsCut

_GRACE_S = 0.5  # gloo's own errors come within milliseconds, on a busy machine too
_LOOK_S = 0.1

R = TypeVar("R")


def patiently(function: Callable[[], R]) -> R:
    """``function()``. While a :class:`~commkit.connections.Wiring` is in use, on a thread of its own, which keeps what it
    refers to alive until it ends.

    Raises:
        ConnectionsCut: the wiring was cut before, or ``function`` did not end soon after.
    """
    wiring = connections.current()
    if wiring is None or getattr(_own, "is_runner", False):
        return function()
    if wiring.cut_for_s() is not None:
        raise ConnectionsCut("these workers are not together any more")
    runner = getattr(_own, "runner", None) or _Runner()
    _own.runner = None  # nobody else's, whatever happens
    future = runner.begin(function)
    while not wait([future], _LOOK_S).done:
        if (wiring.cut_for_s() or 0.0) > _GRACE_S:
            runner.end()
            raise ConnectionsCut("the connections were cut, and a call over them has not ended")
    _own.runner = runner
    return future.result()


class _Runner:
    """One thread."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        thread = threading.Thread(
            target=_run,
            args=(self._jobs, torch.get_num_threads()),
            name="commkit-call",
            daemon=True,
        )
        thread.start()

    def begin(self, function: Callable[[], R]) -> Future[R]:
        future: Future[R] = Future()
        self._jobs.put((function, future))
        return future

    def end(self) -> None:
        """Let the thread end after what it does now."""
        self._jobs.put(None)

    def __del__(self) -> None:
        self.end()


def _run(
    jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None], threads: int
) -> None:
    _own.is_runner = True
    torch.set_num_threads(threads)
    while (job := jobs.get()) is not None:
        function, future = job
        try:
            with torch.no_grad():
                result = function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)
        del job, function, future  # nothing lives on in a thread that waits
        result = None


_own = threading.local()

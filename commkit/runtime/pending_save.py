"""A checkpoint that is being written while training goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

_log = logging.getLogger(__name__)


class PendingSave:
    """A checkpoint that is being written by a thread.

    Args:
        write: what the thread does.
    """

    def __init__(self, write: Callable[[], None]) -> None:
        self._future: Future[None] = Future()

        def run() -> None:
            try:
                write()
            except BaseException as error:
                _log.error("a checkpoint could not be written", exc_info=error)
                self._future.set_exception(error)
            else:
                self._future.set_result(None)

        # No daemon: a program that ends before its last checkpoint is complete waits for it.
        threading.Thread(target=run, name="commkit-checkpoint").start()

    @property
    def done(self) -> bool:
        """Whether the checkpoint is complete, or has failed."""
        return self._future.done()

    def result(self, timeout_s: float | None = None) -> None:
        """Wait until the checkpoint is complete.

        Raises:
            CheckpointError: it could not be written; see :func:`save`.
            TimeoutError: it is not complete after ``timeout_s``.
        """
        try:
            self._future.result(timeout_s)
        except TimeoutError:
            raise
        except FutureTimeout:  # another class before Python 3.11
            raise TimeoutError(
                f"the checkpoint is not complete after timeout_s={timeout_s:g}"
            ) from None

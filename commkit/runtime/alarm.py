"""Makes one rank's failure known to all others within a fraction of a second.

A rank that failed can no longer take part in collectives, and its peers wait in one. The news therefore
goes through the rendezvous store, which every rank looks at while it is attached.
"""

import json
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

_POLL_S = 0.2
_JOIN_S = 5.0


class RankFailure(RuntimeError):
    """A reduction failed, here or on another rank; the message says where and why.

    Reductions of this attachment stay out of step from then on: it cannot be used again.
    """


class Alarm:
    """One flag per process group, raised by any rank, seen by all.

    Args:
        group: the ranks that belong together.
        name: tells attachments of one group apart; equal on all its ranks.
    """

    def __init__(self, group: dist.ProcessGroup, name: str) -> None:
        # A connection of its own: a call that waits would block those of other threads.
        self._store = _get_default_store().clone()  # type: ignore[attr-defined]
        self._key = f"commkit/alarm/{group.group_name}/{name}"
        self._rank = dist.get_rank(group)
        self._listener: Callable[[RankFailure], None] | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="commkit-alarm", daemon=True)

    def listen(self, listener: Callable[[RankFailure], None]) -> None:
        """Call ``listener`` from a thread of its own, at most once, when another rank raises the alarm."""
        self._listener = listener
        self._thread.start()

    def ring(self, failure: RankFailure) -> RankFailure:
        """Tell everybody, and return what everybody is told: the first failure of any rank. A connection
        that a failed peer closed is thus reported as what happened to that peer."""
        text = json.dumps({"rank": self._rank, "message": str(failure)})
        try:
            with self._lock:
                told = json.loads(self._store.compare_set(self._key, "", text))
        except RuntimeError:
            return failure  # the store's host is gone; its peers see that on their own sockets
        return failure if told["rank"] == self._rank else _failure_of(told)

    def close(self) -> None:
        """Stop listening. Waits for the thread: one that is inside a store call when the interpreter ends
        aborts the process."""
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)

    def _watch(self) -> None:
        while not self._stop.wait(_POLL_S):
            try:
                with self._lock:
                    news = self._store.get(self._key) if self._store.check([self._key]) else b""
            except RuntimeError:
                return
            if not news:
                continue
            told = json.loads(news)
            if told["rank"] != self._rank and self._listener is not None:
                self._listener(_failure_of(told))
            return


class NoAlarm:
    """For ranks that are threads of one process and hear of each other's failures in any case."""

    def listen(self, listener: Callable[[RankFailure], None]) -> None:
        pass

    def ring(self, failure: RankFailure) -> RankFailure:
        return failure

    def close(self) -> None:
        pass


def _failure_of(told: dict[str, Any]) -> RankFailure:
    return RankFailure(f"rank {told['rank']} failed: {told['message']}")

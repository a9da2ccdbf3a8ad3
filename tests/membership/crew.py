"""Worker processes that may be killed, stopped and joined by others, around a store that the test hosts."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist

from commkit.membership import Place


def _body(function: Callable[..., Any], place: Place, news: Any, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    told = lambda what: news.send_bytes(pickle.dumps((place.rank, "told", what)))
    try:
        outcome = (place.rank, "result", function(place, told, *args))
    except BaseException as error:
        outcome = (place.rank, "error", (type(error).__name__, str(error), traceback.format_exc()))
    news.send_bytes(pickle.dumps(outcome))
    news.close()
    os._exit(0)


class Crew:
    """Runs ``function(place, tell, *args)`` on each worker; what it tells and returns is collected by rank.

    Args:
        function: importable, with picklable results.
        size: workers at the start.
        deadline_s: after which everybody is killed.
        via: given a rank and the store's port, the port at which that worker is to look for the store.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        size: int,
        *args: Any,
        deadline_s: float = 60.0,
        via: Callable[[int, int], int] = lambda rank, port: port,
    ) -> None:
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "torch.distributed", "commkit"])
        # One from each: a queue's lock would die with the worker that holds it.
        self._news: dict[Any, int] = {}
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._function, self._size, self._args, self._via = function, size, args, via
        self._deadline = time.monotonic() + deadline_s
        self._processes: list[Any] = []
        self.told: dict[int, list[Any]] = {}
        self.results: dict[int, Any] = {}
        self.errors: dict[int, tuple[str, str, str]] = {}
        for _ in range(size):
            self.start()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join(5.0)

    def start(self, *args: Any) -> int:
        """One more worker, with ``args`` after the others'; its rank is the next number."""
        rank = len(self._processes)
        port = self._via(rank, self._store.port)
        place = Place(rank, self._size, "127.0.0.1", port, False, "test")
        receive, send = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_body,
            args=(self._function, place, send, (*self._args, *args)),
            daemon=True,
        )
        process.start()
        send.close()
        self._news[receive] = rank
        self._processes.append(process)
        return rank

    def signal(self, rank: int, number: signal.Signals) -> float:
        """Send a signal; the time."""
        os.kill(self._processes[rank].pid, number)
        return time.time()

    def is_alive(self, rank: int) -> bool:
        """Whether its process still runs."""
        return bool(self._processes[rank].is_alive())

    def lose_store(self) -> None:
        """Its host ends."""
        del self._store

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def wait_for(self, rank: int, what: Any) -> None:
        """Until ``rank`` has told ``what``."""
        while what not in self.told.get(rank, []):
            assert rank not in self.errors, self.errors[rank][2]
            self._collect([rank])

    def finish(self, *ranks: int) -> list[Any]:
        """Results of ``ranks``, in this order.

        Raises:
            AssertionError: one of them ended otherwise, or not in time.
        """
        while not all(rank in self.results or rank in self.errors for rank in ranks):
            self._collect(ranks)
        failed = [self.errors[rank][2] for rank in ranks if rank in self.errors]
        assert not failed, "\n".join(failed)
        return [self.results[rank] for rank in ranks]

    def error_of(self, rank: int) -> tuple[str, str]:
        """Type and message of what ended ``rank``."""
        while rank not in self.errors:
            assert rank not in self.results, f"rank {rank} ended well: {self.results[rank]}"
            self._collect([rank])
        return self.errors[rank][:2]

    def _collect(self, ranks: Any) -> None:
        rest = self._deadline - time.monotonic()
        if rest <= 0:
            raise AssertionError(
                f"ranks {list(ranks)} are late; told {self.told}, results {self.results}, errors {self.errors}"
            )
        for news in wait(list(self._news), min(rest, 1.0)):
            try:
                rank, kind, value = pickle.loads(news.recv_bytes())
            except (EOFError, OSError):  # it has ended
                del self._news[news]
                continue
            if kind == "told":
                self.told.setdefault(rank, []).append(value)
            else:
                (self.results if kind == "result" else self.errors)[rank] = value

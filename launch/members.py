"""Starts workers that may be lost one by one: ``python -m launch.members --nproc 4 train.py ...``.

torchrun ends all workers of a machine when one of them does. This launcher lets the others live, and hosts the store
through which they agree, so that no worker is missed more than another. On several machines, run it on each, with
``--store`` of the first on the others:

    python -m launch.members --host 10.0.0.1 --port 29400 --nproc 2 --workers 4 train.py
    python -m launch.members --store 10.0.0.1:29400 --nproc 2 --workers 4 --first-rank 2 train.py

Started once more with ``--store``, while the others train, its workers join them. It ends when its workers have ended:
with 0 if any of them ended well, as then the training did.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

from commkit.membership.place import STORE

_TICK_S = 0.1
_GRACE_S = 2.0  # others may still ask the store why they have to stop


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Start workers of commkit.Elastic, of which some may be lost."
    )
    parser.add_argument("--nproc", type=int, default=1, help="workers on this machine")
    parser.add_argument("--workers", type=int, help="workers of all machines at the start")
    parser.add_argument("--first-rank", type=int, default=0, help="rank of this machine's first")
    parser.add_argument("--host", default="127.0.0.1", help="this machine's address for the others")
    parser.add_argument("--port", type=int, default=0, help="of the store; 0 takes a free one")
    parser.add_argument("--store", help="host:port of a store that another launcher hosts")
    parser.add_argument("--respawn", type=int, default=0, help="workers to start for lost ones")
    parser.add_argument("program", help="a Python file")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its arguments")
    given = parser.parse_args(arguments)
    if given.nproc < 1 or given.respawn < 0:
        parser.error(f"--nproc={given.nproc} must be >= 1 and --respawn={given.respawn} >= 0")
    store = None
    if given.store is None:
        store = TCPStore(
            given.host,
            given.port,
            is_master=True,
            timeout=timedelta(seconds=60),
            wait_for_workers=False,
        )
        given.store = f"{given.host}:{store.port}"
        print(f"members: the store is at {given.store}", flush=True)
    codes = _Workers(given).run()
    if store is not None:
        time.sleep(_GRACE_S)
    return 0 if 0 in codes else max(map(abs, codes))


class _Workers:
    def __init__(self, given: argparse.Namespace) -> None:
        self._given = given
        self._next_rank = given.first_rank
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._codes: list[int] = []

    def run(self) -> list[int]:
        """Exit codes of all workers, when they have ended."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)
        for _ in range(self._given.nproc):
            self._start()
        replacements = self._given.respawn
        while self._running:
            for rank, process in list(self._running.items()):
                code = process.poll()
                if code is None:
                    continue
                del self._running[rank]
                self._codes.append(code)
                if code:
                    print(f"members: worker {rank} ended with {code}", file=sys.stderr, flush=True)
                if code and replacements and self._running:
                    replacements -= 1
                    self._start()
            time.sleep(_TICK_S)
        return self._codes

    def _start(self) -> None:
        given, rank = self._given, self._next_rank
        self._next_rank += 1
        local = rank - given.first_rank
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(given.workers or given.nproc),
            "LOCAL_RANK": str(local % given.nproc),
            "LOCAL_WORLD_SIZE": str(given.nproc),
            STORE: given.store,
        }
        environment.setdefault("OMP_NUM_THREADS", "1")
        command = [sys.executable, given.program, *given.args]
        self._running[rank] = subprocess.Popen(command, env=environment)

    def _pass_on(self, number: int, frame: object) -> None:
        for process in self._running.values():
            process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())

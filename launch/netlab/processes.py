"""The processes of a node: found, signalled and ended.

Ranks sit in sessions of their own under torchrun, so process groups do not tell which node a
process is of. Its network namespace does; on loopback, a variable in its environment does.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

Belongs = Callable[[int], bool]  # whether a process, given by its id, is of some node
TERM_GRACE_S = 3.0  # from TERM to KILL
KILL_DEADLINE_S = 5.0
_POLL_S = 0.02


def in_namespace(name: str) -> Belongs:
    """Processes whose network namespace is the named one; none if that is gone."""
    try:
        wanted = os.stat(f"/run/netns/{name}")
    except FileNotFoundError:
        return lambda pid: False

    def belongs(pid: int) -> bool:
        try:
            found = os.stat(f"/proc/{pid}/ns/net")
        except OSError:  # ended, or a zombie
            return False
        return (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)

    return belongs


def with_variable(name: str, value: str) -> Belongs:
    """Processes started with this in their environment, and their children."""
    wanted = f"{name}={value}".encode()

    def belongs(pid: int) -> bool:
        try:
            return wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False

    return belongs


def any_of(several: Iterable[Belongs]) -> Belongs:
    """Processes that belong to one of several nodes."""
    all_of_them = list(several)
    return lambda pid: any(belongs(pid) for belongs in all_of_them)


def find(belongs: Belongs) -> list[int]:
    """Ids of all processes that belong, zombies and this process left out."""
    mine = os.getpid()
    return [pid for pid in _all_pids() if pid != mine and belongs(pid)]


def send(pids: list[int], belongs: Belongs, signum: int) -> None:
    """Signal those that still belong: an id may have gone to another process meanwhile."""
    for pid in pids:
        if belongs(pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signum)


def freeze(belongs: Belongs) -> list[int]:
    """Stop all that belong, children born meanwhile included; returns whom."""
    stopped: list[int] = []
    while fresh := [pid for pid in find(belongs) if pid not in stopped]:
        send(fresh, belongs, signal.SIGSTOP)
        stopped += fresh
    return stopped


def end(belongs: Belongs) -> None:
    """TERM to all that belong, KILL to those left 3 s later."""
    pids = find(belongs)
    send(pids, belongs, signal.SIGTERM)
    send(pids, belongs, signal.SIGCONT)  # a stopped process does not see TERM
    if not _wait_until_none(belongs, TERM_GRACE_S):
        deadline = time.monotonic() + KILL_DEADLINE_S
        while pids := find(belongs):
            send(pids, belongs, signal.SIGKILL)
            if time.monotonic() > deadline:
                break  # in the kernel's hands, in uninterruptible sleep
            time.sleep(_POLL_S)


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; with the id it names one process ever."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


def _wait_until_none(belongs: Belongs, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while find(belongs):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _all_pids() -> Iterator[int]:
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit())

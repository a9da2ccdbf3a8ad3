"""The TCP connections of process groups, so that whoever waits in a collective can be woken.

gloo knows no way to end a collective: whoever is not a neighbour of a lost rank waits for the group's timeout, and so
do all if a rank is stopped. Shutting a connection down ends at once everything that waits on it. Which connections
belong to a group is found out while it is made, by comparing this process's sockets before and after with the
addresses that the other members tell. POSIX only.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeAlias

Address: TypeAlias = tuple[str, int]

_FD_DIRECTORY = "/dev/fd"
_ESTABLISHED = 1  # of Linux's tcpi_state


@dataclass(frozen=True, slots=True)
class Connection:
    """An established TCP connection of this process.

    Args:
        fd: its descriptor; whose it is later is only known together with ``inode``.
        inode: of the socket.
        local: this end's address.
        peer: the other end's.
    """

    fd: int
    inode: int
    local: Address
    peer: Address

    @contextmanager
    def _opened(self) -> Iterator[socket.socket | None]:
        """The socket; None if it is closed and its descriptor maybe another's."""
        try:
            copy = os.dup(self.fd)  # of which nobody else knows
        except OSError:
            yield None
            return
        if os.fstat(copy).st_ino != self.inode:
            os.close(copy)
            yield None
            return
        with socket.socket(fileno=copy) as opened:
            yield opened

    def cut(self) -> None:
        """End whatever waits on it, at both ends."""
        with self._opened() as opened, suppress(OSError):
            if opened is not None:
                opened.shutdown(socket.SHUT_RDWR)

    def limit_waits(self, seconds: float) -> None:
        """Whoever waits longer for what the other end sends gets an error, also if that end is stopped or without power
        and so closes nothing. A pause of this process does not count."""
        whole = int(seconds)
        limit = struct.pack("@ll", whole, int(1e6 * (seconds - whole)))
        with self._opened() as opened:
            if opened is not None:
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)

    @property
    def closed(self) -> bool:
        """Whether either end has closed it."""
        with self._opened() as opened:
            if opened is None:
                return True
            if not hasattr(socket, "TCP_INFO"):
                return False
            return opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _ESTABLISHED


def tcp_connections() -> list[Connection]:
    """Those that this process has now."""
    found = []
    for name in os.listdir(_FD_DIRECTORY):
        try:
            status = os.fstat(int(name))
            if not stat.S_ISSOCK(status.st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as opened:
                if opened.family in (socket.AF_INET, socket.AF_INET6):
                    local, peer = opened.getsockname()[:2], opened.getpeername()[:2]
                    found.append(Connection(int(name), status.st_ino, local, peer))
        except OSError:  # not connected, or closed meanwhile
            continue
    return found


class ConnectionsCut(RuntimeError):
    """The workers that were to be connected do not belong together any more."""


class Wiring:
    """The connections of all process groups that are made while it is in :func:`use`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: list[tuple[int, Connection]] = []  # by rank
        self._working: list[Connection] = []
        self._opened: list[Connection] = []  # not yet known whose
        self._before: set[int] | None = None
        self._cut_at: float | None = None

    @contextmanager
    def opening(self) -> Iterator[list[Connection]]:
        """A group is made inside; afterwards the list holds what was opened meanwhile.

        Raises:
            ConnectionsCut: it was cut before or meanwhile.
        """
        opened: list[Connection] = []
        with self._lock:
            self._refuse_cut()
            self._before = {c.inode for c in tcp_connections()}
        try:
            yield opened
        finally:
            with self._lock:
                self._opened = self._new()
                self._before = None
                opened.extend(self._opened)
        self._refuse_cut()

    def keep(
        self,
        opened: Sequence[Connection],
        addresses: Sequence[Sequence[Address]],
        watch: bool = False,
    ) -> None:
        """Of ``opened``, those that lead to ``addresses``, of each rank, are the group's. With ``watch`` they are left
        alone by :meth:`cut`, so that they are closed only when a process ends: nothing may wait on them.

        Raises:
            RuntimeError: there is none to some rank.
        """
        owner = {a: rank for rank, theirs in enumerate(addresses) for a in theirs}
        ours = [(owner[c.peer], c) for c in opened if c.peer in owner]
        found = {rank for rank, _ in ours}
        if len(found) < len(addresses) - 1:
            raise RuntimeError(
                f"of {len(addresses) - 1} other ranks, connections are known to {sorted(found)} alone, so a loss would "
                "not be noticed; unset TORCH_GLOO_LAZY_INIT, and let no address be translated between ranks"
            )
        with self._lock:
            self._opened = []
            if watch:
                self._watched = ours
                return
            self._working += [c for _, c in ours]
            if self._cut_at is not None:
                self._shut(self._working)

    def closed(self) -> set[int]:
        """Ranks of the watched group whose connection to this rank is closed."""
        return {rank for rank, connection in self._watched if connection.closed}

    def cut(self) -> None:
        """End all that waits, and whatever is made later, with an error."""
        with self._lock:
            if self._cut_at is None:
                self._cut_at = time.monotonic()
            self._shut([*self._working, *self._opened, *self._new()])

    def _new(self) -> list[Connection]:
        if self._before is None:
            return []
        return [c for c in tcp_connections() if c.inode not in self._before]

    def cut_for_s(self) -> float | None:
        """Seconds since it was cut first; None: it was not."""
        return None if self._cut_at is None else time.monotonic() - self._cut_at

    def _refuse_cut(self) -> None:
        if self._cut_at is not None:
            raise ConnectionsCut("these workers are not together any more")

    @staticmethod
    def _shut(connections: Sequence[Connection]) -> None:
        for connection in connections:
            connection.cut()


_current: Wiring | None = None


def use(wiring: Wiring | None) -> None:
    """Groups made from now on belong to ``wiring``; None: nobody watches them."""
    global _current
    _current = wiring


def current() -> Wiring | None:
    """See :func:`use`."""
    return _current

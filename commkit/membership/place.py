"""Where a worker finds the others: what launchers put into the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from ..connections import tcp_connections
from .seal import secret_of

STORE = "COMMKIT_STORE"


@dataclass(frozen=True, slots=True)
class Place:
    """
    Args:
        rank: of this worker among those that start together.
        world_size: how many those are.
        host: of the store.
        port: of the store.
        hosts: whether this process is to host the store itself: if it ends, nobody can go on.
        job: tells runs that use the same store apart.
        secret: that all workers share, at least 16 bytes; who has another, or none, is refused. Not shown.
    """

    rank: int
    world_size: int
    host: str
    port: int
    hosts: bool
    job: str
    secret: bytes | None = field(default=None, repr=False)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Place:
        """RANK, WORLD_SIZE, and the store: COMMKIT_STORE=host:port if a launcher hosts one, else MASTER_ADDR and
        MASTER_PORT, where rank 0 hosts it unless torchrun's agent does. COMMKIT_SECRET_FILE (or COMMKIT_SECRET): the secret.

        Raises:
            ValueError: a variable is missing or not a number.
        """
        given = os.environ if environment is None else environment
        rank, world_size = _number(given, "RANK"), _number(given, "WORLD_SIZE")
        secret = secret_of(given)
        job = (
            f"{given.get('TORCHELASTIC_RUN_ID', '')}/{given.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        )
        if STORE in given:
            host, _, port = given[STORE].rpartition(":")
            if not host or not port.isdigit():
                raise ValueError(f"{STORE}={given[STORE]!r} must be host:port")
            return cls(rank, world_size, host, int(port), False, job, secret)
        agent = given.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if "MASTER_ADDR" not in given:
            raise ValueError(
                "MASTER_ADDR is not set; start with python -m launch.members, or set it"
            )
        port_number = _number(given, "MASTER_PORT")
        return cls(
            rank,
            world_size,
            given["MASTER_ADDR"],
            port_number,
            rank == 0 and not agent,
            job,
            secret,
        )

    def stores(self, timeout_s: float) -> tuple[Store, Store]:
        """Two connections to the store, which is hosted here if this is the place; each for a thread of its own. An answer
        that takes longer than ``timeout_s`` is an error."""
        before = {connection.inode for connection in tcp_connections()}
        store = TCPStore(
            self.host,
            self.port,
            is_master=self.hosts,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
        one = PrefixStore(f"commkit/members/{self.job}", store)
        other: Store = one.clone()  # type: ignore[attr-defined]
        for connection in tcp_connections():
            if connection.inode not in before and connection.peer[1] == store.port:
                connection.limit_waits(timeout_s)
        return one, other


def _number(given: Mapping[str, str], name: str) -> int:
    text = given.get(name)
    if text is None:
        raise ValueError(
            f"{name} is not set; start with python -m launch.members, or set it for each worker"
        )
    if not text.isdigit():
        raise ValueError(f"{name}={text!r} must be a whole number")
    return int(text)

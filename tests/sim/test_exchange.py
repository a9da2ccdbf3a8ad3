"""Point-to-point exchange, among threads and processes."""

from __future__ import annotations

import os
import signal

import torch
import torch.distributed as dist

from commkit.comm import DistComm
from commkit.types import Comm
from tests.harness import ThreadComm, run_ranks, run_threads


def _ring(comm: Comm) -> tuple[list[float], int]:
    """Send to the right twice, tags in reversed order of receipt on odd ranks."""
    right, left = (comm.rank + 1) % comm.world_size, (comm.rank - 1) % comm.world_size
    received = []
    for tag in (3, 4):
        into = torch.zeros(2)
        lost = comm.exchange(
            {right: torch.full((2,), 10.0 * comm.rank + tag)}, {left: into}, tag=tag
        )
        assert not lost
        received.append(float(into[1]))
    return received, comm.bytes.wire_bytes


def _expected(rank: int, world_size: int) -> tuple[list[float], int]:
    left = (rank - 1) % world_size
    return [10.0 * left + 3, 10.0 * left + 4], 16


def test_ring_of_threads() -> None:
    assert run_threads(_ring, 3) == [_expected(rank, 3) for rank in range(3)]


def _process_ring(rank: int, world_size: int) -> tuple[list[float], int]:
    assert dist.group.WORLD is not None
    return _ring(DistComm(dist.group.WORLD))


def test_ring_of_processes() -> None:
    assert run_ranks(_process_ring, 3) == [_expected(rank, 3) for rank in range(3)]


def test_only_those_who_exchange_take_part() -> None:
    def run(comm: ThreadComm) -> float | None:
        if comm.rank == 2:
            return None
        into = torch.zeros(1)
        comm.exchange({1 - comm.rank: torch.ones(1) * comm.rank}, {1 - comm.rank: into})
        return float(into)

    assert run_threads(run, 3) == [1.0, 0.0, None]


def _with_a_death(rank: int, world_size: int) -> list[set[int]]:
    """Rank 2 dies; rank 0 talks to it, then to rank 1, who never notices."""
    assert dist.group.WORLD is not None
    comm = DistComm(dist.group.WORLD)
    comm.barrier()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    seen = []
    for round_number in range(3):
        if rank == 0:
            seen.append(comm.exchange({2: torch.ones(9)}, {2: torch.zeros(9)}, tag=round_number))
        into = torch.zeros(9)
        seen.append(
            comm.exchange({1 - rank: torch.ones(9) * rank}, {1 - rank: into}, tag=round_number)
        )
        assert torch.equal(into, torch.ones(9) * (1 - rank))
    return seen


def test_a_killed_peer_is_lost_and_the_others_are_not() -> None:
    one, other, dead = run_ranks(_with_a_death, 3, dying=[2])
    assert dead is None
    assert one == [{2}, set()] * 3
    assert other == [set()] * 3

"""All-to-all and all-gather between pairs, both ways at once."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from commkit.comm import DistComm, private_comm

from .harness import run_ranks

DTYPES = (torch.uint8, torch.float32, torch.bfloat16)


def _everything(rank: int, world_size: int) -> list[str]:
    """What differs from torch's own collectives."""
    comm, wrong = private_comm(dist.group.WORLD, 60.0), []
    generator = torch.Generator().manual_seed(rank)
    for dtype in DTYPES:
        for scale in (1, 20_000):  # the second is more than a connection's buffers take
            # What rank i sends to rank j: nothing for some.
            size = lambda i, j: scale * ((2 * i + j) % 3)  # noqa: B023
            sends = [size(rank, peer) for peer in range(world_size)]
            receives = [size(peer, rank) for peer in range(world_size)]
            x = torch.randint(0, 100, (sum(sends),), generator=generator).to(dtype)
            expected = x.new_empty(sum(receives))
            dist.all_to_all_single(expected, x, receives, sends)
            parts = comm.all_to_all(x, sends, receives)
            if [part.numel() for part in parts] != receives:
                wrong.append(f"sizes of {dtype} {scale}")
            if not torch.equal(torch.cat(parts), expected):
                wrong.append(f"all_to_all of {dtype} {scale}")
            y = torch.randint(0, 100, (scale * 7,), generator=generator).to(dtype)
            rows = y.new_empty(world_size * y.numel())
            dist.all_gather_into_tensor(rows, y)
            if not torch.equal(comm.all_gather(y), rows.view(world_size, -1)):
                wrong.append(f"all_gather of {dtype} {scale}")
    return wrong


@pytest.mark.parametrize("world_size", [2, 3])
def test_they_are_what_torch_makes(world_size: int) -> None:
    assert run_ranks(_everything, world_size) == [[]] * world_size


def _sums(rank: int, world_size: int) -> list[str]:
    """What differs from torch's own all-reduce, where no rounding can, or between ranks, where some has to be."""
    wrong = []
    for comm in (DistComm(dist.group.WORLD), private_comm(dist.group.WORLD, 60.0)):
        generator = torch.Generator().manual_seed(rank)
        for numel in (0, 1, 5, 4096, 70_000):  # the last is left to torch
            for op, torchs in (
                ("sum", dist.ReduceOp.SUM),
                ("max", dist.ReduceOp.MAX),
                ("min", dist.ReduceOp.MIN),
            ):
                for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8):
                    x = torch.randint(0, 60, (numel,), generator=generator).to(dtype)
                    expected = x.clone()
                    dist.all_reduce(expected, op=torchs)
                    if comm.all_reduce(x, op) is not x or not torch.equal(x, expected):
                        wrong.append(f"{op} of {numel} {dtype}")
            own = torch.randn(numel, generator=generator)
            mine = comm.all_reduce(own.clone())
            rows = comm.all_gather(mine)
            if not all(torch.equal(row, mine) for row in rows):
                wrong.append(f"ranks differ in {numel}")
            inputs = comm.all_gather(own).double()
            torch.testing.assert_close(mine.double(), inputs.sum(0), rtol=1e-5, atol=1e-6)
        scalar = torch.tensor(float(rank))
        if float(comm.all_reduce(scalar, "max")) != world_size - 1:
            wrong.append("0-d")
    return wrong


@pytest.mark.parametrize("world_size", [2, 3])
def test_sums_are_those_of_torch(world_size: int) -> None:
    assert run_ranks(_sums, world_size) == [[]] * world_size


def _many_in_a_row(rank: int, world_size: int, private: bool) -> bool:
    """Ranks that are out of step, with an exchange of the same pairs between."""
    comm = private_comm(dist.group.WORLD, 60.0) if private else DistComm(dist.group.WORLD)
    for i in range(200):
        if i % (rank + 7) == 0:
            torch.randn(100, 100) @ torch.randn(100, 100)
        parts = comm.all_to_all(
            torch.full((2 * world_size,), i), [2] * world_size, [2] * world_size
        )
        total = comm.all_reduce(torch.full((3,), i))
        got = torch.zeros(1)
        peer = (rank + world_size // 2) % world_size
        comm.exchange({peer: torch.tensor([float(i)])}, {peer: got})
        if not all(bool((part == i).all()) for part in parts) or float(got) != i:
            return False
        if not bool((total == world_size * i).all()):
            return False
    return True


@pytest.mark.parametrize("private", [False, True])
def test_messages_do_not_mix(private: bool) -> None:
    assert run_ranks(_many_in_a_row, 4, private) == [True] * 4

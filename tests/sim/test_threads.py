"""Ranks as threads: exact, ordered, counted like a network, and never hanging."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from commkit.sim import ThreadComm, run_threads


def test_every_rank_runs_on_its_own_thread_in_rank_order() -> None:
    def body(comm: ThreadComm) -> tuple[int, int, int]:
        comm.barrier()  # the id of a thread that has ended may be given out again
        return comm.rank, comm.world_size, threading.get_ident()

    results = run_threads(body, 3)
    assert [(rank, size) for rank, size, _ in results] == [(0, 3), (1, 3), (2, 3)]
    assert len({thread for *_, thread in results}) == 3


@pytest.mark.parametrize(("op", "expected"), [("sum", 6.0), ("max", 3.0), ("min", 1.0)])
def test_all_reduce_is_in_place(op, expected: float) -> None:
    def body(comm: ThreadComm) -> bool:
        x = torch.full((2, 3), comm.rank + 1.0)
        return comm.all_reduce(x, op) is x and x.tolist() == [[expected] * 3] * 2

    assert all(run_threads(body, 3))


def test_sums_are_taken_in_rank_order() -> None:
    """1e8 + 1 + (-1e8) depends on the order in float32; every rank takes the same one."""
    values = [1e8, 1.0, -1e8, 1.0]

    def body(comm: ThreadComm) -> float:
        return float(comm.all_reduce(torch.tensor([values[comm.rank]])))

    assert run_threads(body, 4) == [1.0] * 4


def test_all_gather_and_broadcast() -> None:
    def body(comm: ThreadComm) -> None:
        own = torch.arange(3) + 10 * comm.rank
        assert comm.all_gather(own).tolist() == [[0, 1, 2], [10, 11, 12]]
        assert own.tolist() == [10 * comm.rank + i for i in range(3)]
        assert comm.broadcast(own, 1) is own
        assert own.tolist() == [10, 11, 12]
        assert comm.all_gather_object({"rank": comm.rank}) == [{"rank": 0}, {"rank": 1}]
        comm.barrier()

    run_threads(body, 2)


def test_all_to_all_with_unequal_parts() -> None:
    sizes = [[1, 2, 0], [3, 1, 1], [0, 0, 2]]  # sizes[a][b] elements from a to b

    def body(comm: ThreadComm) -> list[list[int]]:
        parts = [[10 * comm.rank + to] * n for to, n in enumerate(sizes[comm.rank])]
        message = torch.tensor([x for part in parts for x in part])
        received = comm.all_to_all(message, sizes[comm.rank], [row[comm.rank] for row in sizes])
        return [part.tolist() for part in received]

    results = run_threads(body, 3)
    for to, received in enumerate(results):
        assert received == [[10 * a + to] * sizes[a][to] for a in range(3)]


def test_what_is_received_is_nobody_elses() -> None:
    def body(comm: ThreadComm) -> None:
        x = torch.zeros(2)
        rows = comm.all_gather(x)
        parts = comm.all_to_all(x, [1, 1], [1, 1])
        comm.barrier()
        rows += comm.rank + 1
        parts[0] += comm.rank + 1
        comm.barrier()
        assert rows.tolist() == [[comm.rank + 1.0] * 2] * 2
        assert x.tolist() == [0.0, 0.0]

    run_threads(body, 2)


def test_bytes_are_counted_as_on_a_network() -> None:
    def body(comm: ThreadComm) -> dict[str, int]:
        x = torch.zeros(30)
        comm.all_reduce(x)  # 120 bytes
        comm.all_gather(x[:3])  # 12 bytes
        comm.all_to_all(x[:6], [1, 2, 3], [comm.rank + 1] * 3)
        comm.broadcast(x, 0)
        assert comm.bytes.payload_bytes == 120 + 12 + 24 + 120
        assert comm.bytes.rounds == 4
        return comm.bytes.by_op

    for rank, by_op in enumerate(run_threads(body, 3)):
        assert by_op == {
            "all_reduce": 160,  # 2 (W-1)/W
            "all_gather": 24,  # W-1
            "all_to_all": 24 - 4 * (rank + 1),  # all but one's own part
            "broadcast": 80,
        }


def test_one_rank_alone_counts_nothing() -> None:
    def body(comm: ThreadComm) -> int:
        comm.all_reduce(torch.ones(3))
        comm.all_gather(torch.ones(3))
        return comm.bytes.rounds

    assert run_threads(body, 1) == [0]


@pytest.mark.parametrize(
    "call",
    [
        lambda comm: comm.all_reduce(torch.ones(comm.rank + 1)),
        lambda comm: comm.all_reduce(torch.ones(2, dtype=(torch.int32, torch.int64)[comm.rank])),
        lambda comm: comm.all_reduce(torch.ones(2), ("sum", "max")[comm.rank]),
        lambda comm: comm.all_gather(torch.ones(comm.rank + 1)),
        lambda comm: comm.broadcast(torch.ones(2), comm.rank),
        lambda comm: comm.barrier() if comm.rank else comm.all_reduce(torch.ones(2)),
    ],
    ids=["shape", "dtype", "op", "gather", "source", "collective"],
)
def test_calls_that_do_not_match_raise(call) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank . calls .* while rank . calls"):
        run_threads(call, 2)
    assert time.monotonic() - start < 5


def test_sizes_that_do_not_match_raise() -> None:
    with pytest.raises(ValueError, match=r"expects .* elements but is sent"):
        run_threads(lambda comm: comm.all_to_all(torch.ones(2), [1, 1], [1, 2]), 2)


def test_an_exception_of_one_rank_is_raised_and_frees_the_others() -> None:
    def body(comm: ThreadComm) -> None:
        if comm.rank == 1:
            raise KeyError("rank 1 stumbled")
        comm.barrier()

    start = time.monotonic()
    with pytest.raises(KeyError, match="rank 1 stumbled"):
        run_threads(body, 3)
    assert time.monotonic() - start < 5


def test_a_rank_that_left_is_waited_for_until_the_timeout() -> None:
    def body(comm: ThreadComm) -> None:
        if comm.rank == 0:
            comm.barrier()

    with pytest.raises(threading.BrokenBarrierError):
        run_threads(body, 2, timeout_s=0.2)


def test_parts_of_a_group() -> None:
    """Each with its own ranks and its own order of calls; bytes go to the whole."""

    def body(comm: ThreadComm) -> tuple[float, int, dict[str, int]]:
        halves = [[0, 2], [3, 1]]
        part = comm.split(halves, "half")
        assert comm.split(halves, "half") is part
        assert part.bytes is comm.bytes
        for _ in range(comm.rank % 2):  # the odd half makes a call that the other does not
            part.barrier()
        total = part.all_reduce(torch.tensor([float(comm.rank)]))
        comm.barrier()
        return float(total), part.rank, comm.bytes.by_op

    by_op = {"half/all_reduce": 4}
    expected = [(2.0, 0, by_op), (4.0, 0, by_op), (2.0, 1, by_op), (4.0, 1, by_op)]
    assert run_threads(body, 4) == expected


def test_labelled_bytes_add_up() -> None:
    def body(comm: ThreadComm) -> None:
        comm.all_reduce(torch.ones(4))
        comm.split([[0, 1]], "a").split([[0, 1]], "b").all_reduce(torch.ones(4))
        assert comm.bytes.by_op == {"all_reduce": 16, "a/b/all_reduce": 16}
        assert (comm.bytes.labelled("a"), comm.bytes.labelled("b")) == (16, 0)
        assert comm.bytes.wire_bytes == 32

    run_threads(body, 2)


@pytest.mark.parametrize("groups", [[[0], [1]], [[0, 1], [1, 2]], [[0, 1, 2, 3]]], ids=str)
def test_parts_must_hold_every_rank_once(groups: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="each of the ranks 0 to 2 exactly once"):
        run_threads(lambda comm: comm.split(groups, "part"), 3)


def test_an_exception_frees_ranks_that_wait_in_a_part() -> None:
    def body(comm: ThreadComm) -> None:
        part = comm.split([[0, 1], [2]], "part")
        if comm.rank == 2:
            raise KeyError("rank 2 stumbled")
        if comm.rank == 0:
            part.barrier()

    start = time.monotonic()
    with pytest.raises(KeyError, match="rank 2 stumbled"):
        run_threads(body, 3)
    assert time.monotonic() - start < 5

"""What every transport does, as functions of one rank: partial waiting, lost peers, orderly and other ends.

``LAWS`` says on how many ranks each runs, and which of them die of it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest
import torch

from commkit.transport import (
    Message,
    PeerClosed,
    PeerFailed,
    PeerLost,
    Transport,
    TransportClosed,
    TransportFull,
)


class Lab(Protocol):
    """Some ranks, and a kind of transport between them."""

    rank: int
    world_size: int
    directory: Path  # common to all

    def open(self, **options: Any) -> Transport: ...

    def renewed(self) -> Lab:
        """The same ranks in another group. Collective."""

    def barrier(self) -> None: ...


PATIENCE_S = 60.0  # a busy machine may take long for anything


def say(lab: Lab, what: str) -> None:
    """Let the other ranks know, by other means than a transport."""
    (lab.directory / what).touch()


def hear(lab: Lab, what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not (lab.directory / what).exists():
        assert time.monotonic() < end, f"nobody said {what!r}"
        time.sleep(0.01)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("commkit-transport")]


def in_order(lab: Lab) -> tuple[list[tuple[int, int, float]], int, int]:
    got = []
    with lab.open() as transport:
        others = [r for r in range(lab.world_size) if r != lab.rank]
        for number in range(5):
            for peer in others:
                x = torch.full((100 * number,), float(lab.rank))
                transport.isend(peer, Message(1, number, lab.rank, (x, torch.tensor(number))))
                x.fill_(-1.0)  # the transport has a copy
        for peer in others:
            for _ in range(5):
                pending = transport.irecv(peer)
                assert transport.wait_some([pending], PATIENCE_S) == [0]
                message = pending.result()
                x, number = message.tensors
                assert bool((x == peer).all())
                assert x.numel() == 100 * int(number)
                got.append((peer, message.sequence, float(message.version)))
        lab.barrier()
    assert not threads()
    sent = transport.sent  # what has arrived may be counted a little later
    return got, sent.payload_bytes, sent.wire_bytes


def first_comes(lab: Lab) -> list[int] | None:
    with lab.open(peers=[0] if lab.rank else None) as transport:
        if lab.rank:
            if lab.rank == 1:
                hear(lab, "two have come")
            transport.isend(0, Message(0, lab.rank))
            lab.barrier()
            return None
        pending = [transport.irecv(peer) for peer in (1, 2, 3)]
        assert transport.wait_some(pending, 0.0) in ([], [1], [2], [1, 2])
        while len(first := transport.wait_some(pending, PATIENCE_S)) < 2:
            pass
        with pytest.raises(RuntimeError, match="under way"):
            pending[0].result()
        assert transport.wait_some(pending[:1], 0.01) == []  # a deadline that passes breaks nothing
        say(lab, "two have come")
        assert transport.wait_some(pending[:1], PATIENCE_S) == [0]
        assert pending[0].result().sequence == 1
        lab.barrier()
    return first


def with_a_death(lab: Lab) -> None:
    transport = lab.open()
    if lab.rank == 2:
        transport.isend(0, Message(0, 41))
        pending = transport.irecv(0)
        transport.wait_some([pending], PATIENCE_S)
        os.kill(os.getpid(), signal.SIGKILL)
    if lab.rank == 0:
        last, after, other = transport.irecv(2), transport.irecv(2), transport.irecv(1)
        assert transport.wait_some([last], PATIENCE_S) == [0]
        transport.isend(2, Message(0))  # which it dies of
        assert transport.wait_some([after], PATIENCE_S) == [0]
        assert last.result().sequence == 41  # and is still there after the end
        with pytest.raises(PeerLost, match="rank 2 is lost") as error:
            after.result()
        assert error.value.peer == 2
        with pytest.raises(PeerLost, match="rank 2"):
            transport.isend(2, Message(0))
        transport.isend(1, Message(0, 5))
        assert transport.wait_some([other], PATIENCE_S) == [0]
        assert other.result().sequence == 5
    if lab.rank == 1:
        pending = transport.irecv(0)
        assert transport.wait_some([pending], PATIENCE_S) == [0]
        transport.isend(0, Message(0, pending.result().sequence))
    transport.close()
    assert not threads()


def ends(lab: Lab) -> None:
    transport = lab.open()
    if lab.rank == 0:
        pending = transport.irecv(1)
        transport.isend(1, Message(0, 1, tensors=(torch.ones(200_000),)))
        with pytest.raises(ZeroDivisionError), transport:
            1 / 0  # noqa: B018
        with pytest.raises(TransportClosed):
            pending.result()
        with pytest.raises(TransportClosed):
            transport.isend(1, Message(0))
        transport.close()
        return
    first, second = transport.irecv(0), transport.irecv(0)
    assert transport.wait_some([second], PATIENCE_S)
    assert first.result().tensors[0].numel() == 200_000
    with pytest.raises(PeerFailed, match="rank 0 failed: ZeroDivisionError"):
        second.result()
    transport.close()
    with pytest.raises(TransportClosed):
        transport.isend(0, Message(0))


def leaves(lab: Lab) -> None:
    transport = lab.open(close_s=PATIENCE_S)
    if lab.rank == 1:
        pending = transport.irecv(0)
        assert transport.wait_some([pending], PATIENCE_S) == [0]
        with pytest.raises(PeerClosed, match="rank 0 has left"):
            pending.result()
        hear(lab, "rank 0 is out")  # its farewell does not wait for ours
    transport.close()
    assert not threads()
    if lab.rank == 0:
        say(lab, "rank 0 is out")


def stuck(lab: Lab) -> float | None:
    file = lab.directory / "pid"
    if lab.rank == 1:
        file.write_text(str(os.getpid()))
    transport = lab.open(queue_size=2, close_s=0.5)
    lab.barrier()
    if lab.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(2 * PATIENCE_S)  # it is killed before
    time.sleep(0.3)
    large = Message(0, tensors=(torch.ones(1_000_000),))
    for _ in range(3):
        transport.isend(1, large)
        time.sleep(0.1)  # the first is on its way then, and two wait
    with pytest.raises(TransportFull, match="queue_size=2"):
        transport.isend(1, large)
    start = time.monotonic()
    transport.close()
    seconds = time.monotonic() - start
    assert not threads()
    os.kill(int(file.read_text()), signal.SIGKILL)
    return seconds


def slow_reader(lab: Lab) -> int:
    with lab.open(queue_size=2) as transport:
        if lab.rank == 0:
            sent = []
            while len(sent) < 12:
                try:
                    sent.append(transport.isend(1, Message(0, len(sent))))
                except TransportFull:
                    waiting = [one for one in sent if not one.done]
                    assert transport.wait_some(waiting, PATIENCE_S)
            transport.wait_some([transport.irecv(1)], PATIENCE_S)
            return 0
        time.sleep(0.5)
        numbers = []
        while len(numbers) < 12:
            pending = transport.irecv(0)
            transport.wait_some([pending], PATIENCE_S)
            numbers.append(pending.result().sequence)
        assert numbers == list(range(12))
        transport.isend(0, Message(0))
        return len(numbers)


def moves_alone(lab: Lab) -> None:
    """A large message goes out while its sender is busy with something else, and comes in likewise."""
    with lab.open() as transport:
        if lab.rank == 0:
            transport.isend(1, Message(0, tensors=(torch.ones(4_000_000),)))
            hear(lab, "all is here")  # which is no call of the transport
        else:
            pending = transport.irecv(0)
            assert transport.wait_some([pending], PATIENCE_S) == [0]
            say(lab, "all is here")


def refusals(lab: Lab) -> None:
    with pytest.raises(ValueError, match="queue_size=0"):
        lab.open(queue_size=0)
    with pytest.raises(ValueError, match=r"peers=\[7\]"):
        lab.open(peers=[7])
    if lab.rank == 0:
        with pytest.raises(
            TimeoutError, match=r"ranks \[1\] made no transport within connect_s=0.3"
        ):
            lab.open(connect_s=0.3)
    lab.barrier()
    with lab.renewed().open() as transport:
        peer = 1 - lab.rank
        with pytest.raises(ValueError, match="kind=-1"):
            transport.isend(peer, Message(-1))
        with pytest.raises(ValueError, match="not among the peers"):
            transport.irecv(lab.rank)
        with pytest.raises(TypeError, match="complex64"):
            transport.isend(peer, Message(0, tensors=(torch.zeros(1, dtype=torch.complex64),)))


class Law(NamedTuple):
    body: Callable[[Lab], Any]
    world_size: int
    dying: tuple[int, ...] = ()


LAWS = {
    "in_order": Law(in_order, 3),
    "first_comes": Law(first_comes, 4),
    "ends": Law(ends, 2),
    "leaves": Law(leaves, 2),
    "slow_reader": Law(slow_reader, 2),
    "moves_alone": Law(moves_alone, 2),
    "refusals": Law(refusals, 2),
    "with_a_death": Law(with_a_death, 3, (2,)),
    "stuck": Law(stuck, 2, (1,)),
}

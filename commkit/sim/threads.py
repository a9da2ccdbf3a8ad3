"""Ranks as threads of one process: an exact, ordered :class:`~commkit.types.Comm` for tests and studies.

Sums are taken in rank order, so that every rank gets the same bits. Bytes are counted as on a real
network.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..comm import all_reduce_wire_bytes, nbytes, part_of
from ..types import ByteCounter, ReduceOp

T = TypeVar("T")
_PATIENCE_S = 0.1
_DIFFERENT = object()  # in place of an outcome: ranks do not make the same call


class _Group:
    def __init__(self, world_size: int, timeout_s: float) -> None:
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size, timeout=timeout_s)
        self.slots: list[Any] = [None] * world_size
        self.outcome: Any = None  # of the call that is under way, for all ranks
        self.timeout_s = timeout_s
        self.parts: list[_Group] = []
        # What is on its way, by (sender, receiver, tag).
        self.mail: dict[tuple[int, int, int], queue.SimpleQueue[Tensor]] = {}
        self.mail_lock = threading.Lock()

    def box(self, sender: int, receiver: int, tag: int) -> queue.SimpleQueue[Tensor]:
        with self.mail_lock:
            return self.mail.setdefault((sender, receiver, tag), queue.SimpleQueue())

    def abort(self) -> None:
        """Release everybody who waits, in parts of the group too."""
        self.barrier.abort()
        for part in self.parts:
            part.abort()


class ThreadComm:
    """One rank's end of a group of threads, made by :func:`run_threads`."""

    def __init__(self, group: _Group, rank: int) -> None:
        self._group = group
        self._rank = rank
        self._bytes = ByteCounter()
        self._label = ""
        self._parts: dict[tuple[str, tuple[int, ...]], ThreadComm] = {}

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._group.world_size

    @property
    def bytes(self) -> ByteCounter:
        return self._bytes

    def all_reduce(self, x: Tensor, op: ReduceOp = "sum") -> Tensor:
        call = ("all_reduce", x.shape, x.dtype, op)
        total = self._exchange(call, x.clone(), lambda values: _reduced(values, op))
        self._count("all_reduce", nbytes(x), all_reduce_wire_bytes(nbytes(x), self.world_size))
        return x.copy_(total)

    def all_gather(self, x: Tensor) -> Tensor:
        gathered = self._exchange(("all_gather", x.shape, x.dtype), x.clone(), torch.stack)
        self._count("all_gather", nbytes(x), (self.world_size - 1) * nbytes(x))
        own: Tensor = gathered.clone()
        return own

    def all_to_all(
        self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]
    ) -> list[Tensor]:
        gathered = self._exchange(
            ("all_to_all", x.dtype), x.clone().split_with_sizes([*send_sizes])
        )
        received = [parts[self._rank] for parts in gathered]
        if [part.numel() for part in received] != list(recv_sizes):
            raise ValueError(
                f"all_to_all: rank {self._rank} expects {list(recv_sizes)} elements but is sent "
                f"{[part.numel() for part in received]}"
            )
        own = send_sizes[self._rank] * x.element_size()
        self._count("all_to_all", nbytes(x), nbytes(x) - own)
        return [part.clone() for part in received]

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        gathered = self._exchange(("broadcast", x.shape, x.dtype, src), x.clone())
        wire = (self.world_size - 1) * nbytes(x) // self.world_size
        self._count("broadcast", nbytes(x), wire)
        return x.copy_(gathered[src])

    def exchange(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], tag: int = 0
    ) -> set[int]:
        group = self._group
        for peer, x in sends.items():
            group.box(self._rank, peer, tag).put(x.clone())
        deadline = time.monotonic() + group.timeout_s
        for peer, x in receives.items():
            box = group.box(peer, self._rank, tag)
            while True:
                try:
                    x.copy_(box.get(timeout=_PATIENCE_S))
                    break
                except queue.Empty:
                    if group.barrier.broken or time.monotonic() > deadline:
                        raise threading.BrokenBarrierError from None
        size = sum(map(nbytes, sends.values()))
        self._count("exchange", size, size)
        return set()

    def all_gather_object(self, obj: Any) -> list[Any]:
        return list(self._exchange(("all_gather_object",), obj))

    def barrier(self) -> None:
        self._exchange(("barrier",), None)

    def split(self, groups: Sequence[Sequence[int]], label: str) -> ThreadComm:
        own = part_of(groups, self._rank, self.world_size)
        if (label, own) not in self._parts:
            made = None
            if own[0] == self._rank:
                made = _Group(len(own), self._group.timeout_s)
                self._group.parts.append(made)
            call = ("split", tuple(map(tuple, groups)), label)
            part = ThreadComm(self._exchange(call, made)[own[0]], own.index(self._rank))
            part._bytes, part._label = self._bytes, f"{self._label}{label}/"
            self._parts[label, own] = part
        return self._parts[label, own]

    def _exchange(
        self, call: tuple[Any, ...], value: Any, combine: Callable[[list[Any]], Any] = list
    ) -> Any:
        """What ``combine`` makes of everybody's values, in rank order: one object for all, made once, so that many ranks
        cost no more than their number. Ranks that make different calls are told, where a real group would hang."""
        group = self._group
        group.slots[self._rank] = (call, value)
        group.barrier.wait()
        if self._rank == 0:
            alike = all(other == call for other, _ in group.slots)
            group.outcome = combine([value for _, value in group.slots]) if alike else _DIFFERENT
        group.barrier.wait()  # nobody may overwrite a slot that is still being read
        outcome = group.outcome
        if outcome is _DIFFERENT:
            rank, other = next((r, o) for r, (o, _) in enumerate(group.slots) if o != call)
            raise RuntimeError(f"rank {self._rank} calls {call} while rank {rank} calls {other}")
        return outcome

    def _count(self, op: str, payload_bytes: int, wire_bytes: int) -> None:
        if self.world_size > 1:
            self._bytes.add(self._label + op, payload_bytes, wire_bytes, 0.0)


def _reduced(values: list[Tensor], op: ReduceOp) -> Tensor:
    """In the order of ``values``."""
    total = values[0].clone()
    for other in values[1:]:
        if op == "sum":
            total += other
        else:
            total = torch.maximum(total, other) if op == "max" else torch.minimum(total, other)
    return total


def run_threads(
    function: Callable[[ThreadComm], T], world_size: int, timeout_s: float = 60.0
) -> list[T]:
    """Run ``function(comm)`` on ``world_size`` threads; their results in rank order.

    Raises:
        Exception: the first exception of any rank. The others are released from their barrier.
    """
    group = _Group(world_size, timeout_s)
    results: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    def body(rank: int) -> None:
        try:
            results[rank] = function(ThreadComm(group, rank))
        except BaseException as error:
            errors.append(error)
            group.abort()

    threads = [threading.Thread(target=body, args=(r,), daemon=True) for r in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
    if errors:
        raise (real or errors)[0]
    return results

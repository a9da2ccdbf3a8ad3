"""One rank of a group of any size whose peers all do what it does: a :class:`~commkit.types.Comm` for the *traffic* of a
scheme, at the price of one rank.

Whatever this rank sends, every peer sends as well, so that an all-reduce multiplies, an all-gather repeats, and what
comes from a partner is what went to it. Calls are written down in order.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..comm import all_reduce_wire_bytes, nbytes, part_of
from ..types import ByteCounter, ReduceOp

Op = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "exchange"]


@dataclass(frozen=True, slots=True)
class Call:
    """One collective of one rank.

    Args:
        op: which.
        scope: the group: "" is all ranks, else the label of :meth:`~commkit.types.Comm.split`.
        payload: bytes handed to it by a rank.
        ranks: in the group.
    """

    op: Op
    scope: str
    payload: int
    ranks: int


class MirrorComm:
    """Rank 0 of ``world_size`` equal ranks.

    Attributes:
        calls: all collectives so far, those of parts too.
        bytes: as on a real network; its seconds are what the mirror itself took, to be left out of timings.
    """

    rank = 0

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.bytes = ByteCounter()
        self.calls: list[Call] = []
        self._label = ""
        self._parts: dict[tuple[str, tuple[int, ...]], MirrorComm] = {}

    def all_reduce(self, x: Tensor, op: ReduceOp = "sum") -> Tensor:
        start = time.perf_counter()
        if op == "sum":
            x.mul_(self.world_size)
        self._count(
            "all_reduce", nbytes(x), all_reduce_wire_bytes(nbytes(x), self.world_size), start
        )
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        start = time.perf_counter()
        out = x.repeat(self.world_size, 1)
        self._count("all_gather", nbytes(x), (self.world_size - 1) * nbytes(x), start)
        return out

    def all_to_all(
        self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]
    ) -> list[Tensor]:
        start = time.perf_counter()
        own = x[: send_sizes[0]]
        received = [
            own.clone() if size == own.numel() else x.new_zeros(size) for size in recv_sizes
        ]
        self._count("all_to_all", nbytes(x), nbytes(x) - nbytes(own), start)
        return received

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        wire = (self.world_size - 1) * nbytes(x) // self.world_size
        self._count("broadcast", nbytes(x), wire, time.perf_counter())
        return x

    def exchange(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], tag: int = 0
    ) -> set[int]:
        start = time.perf_counter()
        for peer, x in receives.items():
            sent = sends.get(peer)
            if sent is not None and sent.shape == x.shape:
                x.copy_(sent)
            else:
                x.zero_()
        size = sum(map(nbytes, sends.values()))
        self._count("exchange", size, size, start)
        return set()

    def all_gather_object(self, obj: Any) -> list[Any]:
        return [obj] * self.world_size

    def barrier(self) -> None: ...

    def split(self, groups: Sequence[Sequence[int]], label: str) -> MirrorComm:
        own = part_of(groups, self.rank, self.world_size)
        if (label, own) not in self._parts:
            part = MirrorComm(len(own))
            part.bytes, part.calls = self.bytes, self.calls
            part._label = self._label if len(own) == self.world_size else f"{self._label}{label}"
            self._parts[label, own] = part
        return self._parts[label, own]

    def _count(self, op: Op, payload: int, wire: int, start: float) -> None:
        if self.world_size > 1:
            self.calls.append(Call(op, self._label, payload, self.world_size))
            label = f"{self._label}/" if self._label else ""
            self.bytes.add(label + op, payload, wire, time.perf_counter() - start)


def gradients_like(shapes: Mapping[str, torch.Size], seed: int) -> dict[str, Tensor]:
    """Normal random tensors: what traffic and time of compression are taken of."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

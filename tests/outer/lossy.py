"""Threads some of whose links are cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tests.harness import ThreadComm

Cut = Callable[[int, int, int], bool]


class LossyComm:
    """A ThreadComm whose exchanges lose the peers that ``cut(rank, peer, tag)`` says; the peer must be told the
    same. Everything else is the ThreadComm's."""

    def __init__(self, comm: ThreadComm, cut: Cut) -> None:
        self._comm, self._cut = comm, cut

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def split(self, groups: Sequence[Sequence[int]], label: str) -> LossyComm:
        return LossyComm(self._comm.split(groups, label), self._cut)

    def exchange(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], tag: int = 0
    ) -> set[int]:
        peers = set(sends) | set(receives)
        lost = {peer for peer in peers if self._cut(self._comm.rank, peer, tag)}
        kept = [{p: x for p, x in each.items() if p not in lost} for each in (sends, receives)]
        self._comm.exchange(*kept, tag)
        return lost

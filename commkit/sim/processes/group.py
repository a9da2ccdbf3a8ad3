"""Collectives in virtual time, of processes that may die in the middle of one."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ...comm import CollectiveError, nbytes, part_of
from ...connections import Wiring
from ...types import ByteCounter
from ..membership.network import VirtualNetwork
from ..threads import ThreadComm
from .turns import Turns


class VirtualWiring(Wiring):
    """The connections of one process in an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: set[int] = set()  # ranks whose process has ended, as far as is known
        self.shut_by: set[int] = set()
        self.over = False
        self.tell: Any = lambda: None

    def may_end(self, box: deque[Tensor], origin: int) -> bool:
        """Whether something of ``origin`` is in ``box``, or nothing can come any more."""
        return bool(box) or self.over or origin in self.shut_by

    def closed(self) -> set[int]:
        return set(self.ended)

    def cut(self) -> None:
        if not self.over:
            self.over = True
            self.tell()


class VirtualGroup:
    """What members of an epoch send to each other.

    Args:
        names: of the processes, by rank.
    """

    def __init__(self, names: Sequence[str], turns: Turns, network: VirtualNetwork) -> None:
        self.names = list(names)
        self.turns, self.network = turns, network
        self.wirings: dict[int, VirtualWiring] = {}
        # By receiver: (label, number of the call) -> sender -> value; and (label, sender, tag) -> values.
        self.calls: dict[int, dict[tuple[str, int], dict[int, Any]]] = defaultdict(
            lambda: defaultdict(dict)
        )
        self.mail: dict[int, dict[tuple[str, int, int], deque[Tensor]]] = defaultdict(
            lambda: defaultdict(deque)
        )

    def enter(self, rank: int, wiring: VirtualWiring) -> None:
        self.wirings[rank] = wiring
        wiring.tell = lambda: self._tell_all(rank, "shut_by")

    def end(self, rank: int) -> None:
        """Its process has ended, and its system closes its connections."""
        for what in ("shut_by", "ended"):
            self._tell_all(rank, what)

    def _tell_all(self, rank: int, what: str) -> None:
        for other, name in enumerate(self.names):
            if other != rank:
                self.network.send(
                    self.names[rank],
                    name,
                    lambda other=other: self._close(other, rank, what),  # type: ignore[misc]
                    sure=True,
                )

    def _close(self, rank: int, by: int, what: str) -> None:
        if rank in self.wirings:
            getattr(self.wirings[rank], what).add(by)
        else:  # it has no connections yet
            self.network.clock.after(0.05, lambda: self._close(rank, by, what))


class VirtualComm(ThreadComm):
    """One process's end of a :class:`VirtualGroup`: sums in rank order, as in the parent class."""

    def __init__(
        self, group: VirtualGroup, members: Sequence[int], place: int, label: str = ""
    ) -> None:
        self._virtual, self._members, self._place = group, list(members), place
        self._rank = self._members.index(place)
        self._name = label
        self._number = 0
        self._bytes = ByteCounter()
        self._label = ""
        self._parts: dict[Any, Any] = {}
        self._splits = 0

    @property
    def world_size(self) -> int:
        return len(self._members)

    @property
    def _wiring(self) -> VirtualWiring:
        return self._virtual.wirings[self._place]

    def _exchange(
        self, call: tuple[Any, ...], value: Any, combine: Callable[[list[Any]], Any] = list
    ) -> Any:
        group, key = self._virtual, (self._name, self._number)
        self._number += 1
        self._require_whole()
        for other in self._members:
            self._post(other, key, (call, value))
        arrived = group.calls[self._place][key]

        def missing() -> set[int]:
            return set(self._members) - set(arrived)

        def over() -> bool:
            return not missing() or self._wiring.over or bool(missing() & self._wiring.shut_by)

        group.turns.wait(over)
        if missing():
            self._require_whole()
            raise CollectiveError(f"connection closed by peer {sorted(missing())}")
        told = [arrived[other] for other in self._members]
        for rank, (other_call, _) in enumerate(told):
            if other_call != call:
                raise AssertionError(
                    f"rank {self._rank} calls {call} while rank {rank} calls {other_call}"
                )
        return combine([each for _, each in told])

    def _require_whole(self) -> None:
        if self._wiring.over:
            raise CollectiveError("these connections are cut")

    def _post(self, to: int, key: tuple[str, int], message: Any) -> None:
        group, sender = self._virtual, self._place

        def arrive() -> None:
            group.calls[to][key][sender] = message

        if to == sender:
            arrive()
        else:
            group.network.send(group.names[sender], group.names[to], arrive)

    def exchange(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], tag: int = 0
    ) -> set[int]:
        group, place = self._virtual, self._place
        wiring, name = self._wiring, self._name
        for peer, x in sends.items():
            to = self._members[peer]
            box, sent = group.mail[to][name, place, tag], x.clone()
            group.network.send(group.names[place], group.names[to], partial(box.append, sent))
        lost = {p for p in sends if wiring.over or self._members[p] in wiring.shut_by}
        for peer, x in receives.items():
            origin = self._members[peer]
            box = group.mail[place][name, origin, tag]
            group.turns.wait(partial(wiring.may_end, box, origin))
            if box and not wiring.over:
                x.copy_(box.popleft())
            else:
                lost.add(peer)
        size = sum(map(nbytes, sends.values()))
        self._count("exchange", size, size)
        return lost

    def split(self, groups: Sequence[Sequence[int]], label: str) -> VirtualComm:
        own = part_of(groups, self._rank, self.world_size)
        self._splits += 1
        name = f"{self._name}/{label}{self._splits}"
        return VirtualComm(self._virtual, [self._members[rank] for rank in own], self._place, name)

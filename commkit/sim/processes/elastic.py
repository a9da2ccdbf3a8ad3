"""``Elastic`` and its agent, as they are in production, but for time, threads and sockets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...comm import CollectiveError
from ...connections import ConnectionsCut
from ...membership import Elastic, ElasticOptions, Member, View
from ...membership.agent import Agent
from ...runtime.alarm import RankFailure
from ..membership.judge import InvariantError
from .group import VirtualComm, VirtualWiring
from .turns import Killed, News, Process, Turns

if TYPE_CHECKING:
    from .world import World


class _Thread:
    def __init__(self, turns: Turns, process: Process, name: str, body: Callable[[], None]) -> None:
        self._turns = turns
        self._turn = turns.start(process, name, body)

    def is_alive(self) -> bool:
        return not self._turn.over

    def join(self, seconds: float) -> None:
        self._turns.wait(lambda: self._turn.over, seconds)


class VirtualAgent(Agent):
    """An agent whose thread takes turns."""

    def __init__(self, member: Member, store: Any, world: World, process: Process) -> None:
        self._member, self._store, self._clock = member, store, world.clock
        self._process = process
        self._changed: Any = News(world.turns)
        self._wake: Any = News(world.turns)
        self._stop = False
        self._lost: str | None = None
        self._wiring: Any = None
        self._beat = 0
        self._next_beat = 0.0
        self._world = world
        self._seen = member.view
        self._thread: Any = _Thread(world.turns, process, "agent", self._run)

    def now(self) -> float:  # type: ignore[override]
        return self._clock.now

    def wired(self, view: View) -> VirtualWiring:
        wiring = VirtualWiring()
        self._wiring = view.epoch, wiring
        self._wake.set()
        return wiring

    def _turn(self) -> bool:
        more = super()._turn()
        if self._member.view is not self._seen:
            self._seen = self._member.view
            try:
                self._world.judge.saw_view(
                    self._member.worker, self._seen, self._member.ledger.left
                )
            except InvariantError as broken:  # which the thread would take for a loss of the store
                self._world.broken.append(broken)
        return more

    def order(self, change: Callable[[Member], None]) -> None:
        if self._process.dead:
            raise Killed
        super().order(change)


class VirtualElastic(Elastic):
    """Meets the others in a :class:`~.world.World`.

    Args:
        place: among those who start together.
    """

    def __init__(
        self, options: ElasticOptions, world: World, process: Process, place: int, size: int
    ) -> None:
        super().__init__(options)
        self._world, self._process, self._number_of_place, self._size = world, process, place, size
        self._worker = process.name

    @property
    def members(self) -> tuple[str, ...]:
        """By rank."""
        return self._view.members

    def _meet(self) -> Agent:
        world, self._hosts = self._world, False
        member = Member(
            self._worker, self.options, self._size, self._number_of_place, world.clock.now
        )
        return VirtualAgent(member, world.store_of(self._process), world, self._process)

    def _form(self, view: View) -> None:
        wiring = self.agent.wired(view)
        group = self._world.group_of(view)
        rank = view.members.index(self._worker)
        group.enter(rank, wiring)  # type: ignore[arg-type]
        self._world.groups_of[self._process.name] = group, rank
        comm = VirtualComm(group, range(len(view.members)), rank)
        try:
            comm.barrier()
        except CollectiveError as error:
            raise CollectiveError(
                f"the group of epoch {view.epoch} was not made: {error}"
            ) from error
        if wiring.over:  # type: ignore[attr-defined]
            raise ConnectionsCut("these workers are not together any more")
        self.comm = comm  # type: ignore[assignment]
        self._view, self._formed = view, view.epoch


class VirtualWorker:
    """What :class:`~commkit.runtime.worker.ReductionWorker` promises: jobs in order, and after a failure all fail."""

    def __init__(self, turns: Turns, process: Process) -> None:
        self.failure: RankFailure | None = None
        self._turns = turns
        self._jobs: list[tuple[Callable[[], Tensor], _Waiting]] = []
        self._closed = False
        self._thread = _Thread(turns, process, "reducer", self._run)

    def submit(
        self, reduce: Callable[[], Tensor], like: Tensor, uses: Sequence[Tensor] = ()
    ) -> _Waiting:
        waiting = _Waiting(self._turns)
        if self._closed and self.failure is None:
            self.failure = RankFailure("the attachment is closed")
        if self.failure is not None:
            waiting.finish(self.failure)
        else:
            self._jobs.append((reduce, waiting))
        return waiting

    def close(self) -> None:
        self._closed = True
        if self.failure is None:
            self._turns.wait(lambda: not self._thread.is_alive())

    def _run(self) -> None:
        while True:
            self._turns.wait(lambda: bool(self._jobs) or self._closed)
            if not self._jobs:
                return
            reduce, waiting = self._jobs.pop(0)
            if self.failure is None:
                try:
                    with torch.no_grad():
                        reduce()
                except Exception as error:
                    self.failure = RankFailure(f"{type(error).__name__}: {error}")
                    self.failure.__cause__ = error
            waiting.finish(self.failure)


class _Waiting:
    """A future."""

    def __init__(self, turns: Turns) -> None:
        self._turns, self._done = turns, False
        self._failure: RankFailure | None = None

    def finish(self, failure: RankFailure | None) -> None:
        self._done, self._failure = True, failure

    def wait(self) -> None:
        self._turns.wait(lambda: self._done)
        if self._failure is not None:
            raise self._failure

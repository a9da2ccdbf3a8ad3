"""The first coordinator's loop: it opens rounds, takes what comes, and judges who is late."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..runtime.alarm import RankFailure
from ..transport import Message, PeerClosed, PeerFailed, PeerLost
from .arrivals import Arrivals
from .attendance import Attendance
from .gate import Gate
from .others import OtherCoordinators, part_lost
from .protocol import Kind, Plan, ProtocolError, message
from .receiver import Receiver
from .schedule import NotDecodable
from .settling import ClosedRound, Settler

if TYPE_CHECKING:
    from .coordinator import Coordinator, OnStep

_REMEMBERED = 64  # rounds whose beginning is known, for those who come late


class Leader:
    """
    Args:
        coordinator: whose weights, scheme and transport it drives.
        on_step: see :meth:`Coordinator.run`, as the other.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        on_step: OnStep | None,
        whole_at: Callable[[int], bool] | None,
    ) -> None:
        self._coordinator = coordinator
        self._options = coordinator.options
        self._party = coordinator.party
        self._rounds = coordinator.rounds
        self._transport = coordinator.transport
        self._stats = coordinator.stats
        self._now = coordinator.clock
        self._ranks = coordinator.party.workers  # by worker, as they are numbered here
        self._place = {rank: worker for worker, rank in enumerate(self._ranks)}
        self._receiver = Receiver(self._transport, (*self._ranks, *self._party.others))
        self._others = OtherCoordinators(coordinator, self._receiver, self._hear)
        self._settler = Settler(coordinator, self._others, on_step, whole_at)
        self._attendance = Attendance(len(self._ranks), coordinator.options.max_behind)
        self._began: dict[int, float] = {}  # when each round did
        self._ending = False
        # Of the round that is under way.
        self._arrivals = Arrivals()
        self._opened = -1  # the last round
        self._judging = False  # whether it is open

    @property
    def _gate(self) -> Gate:
        return self._coordinator.gate

    def run(self) -> None:
        ended = self._now()
        while not self._rounds.ended:
            self._open(self._rounds.job)
            self._wait()
            ended = self._close(ended)
        self._finish()

    # A round begins.

    def _open(self, job: int | None) -> None:
        rounds, coordinator = self._rounds, self._coordinator
        number = rounds.number
        self._arrivals = Arrivals(rounds.plan(), len(coordinator.buffers), len(self._party.others))
        dead = self._attendance.dead
        gate = coordinator.gate = Gate(rounds, self._options.grace_s, self._now(), dead)
        changes = coordinator.begin(job)
        told, whole = self._attendance.to_tell()
        self._others.tell(message(Kind.TELL, number, 0, [_numbers(job), _list(told), _list(whole)]))
        for worker in (*told, *whole):
            self._send(worker, number, job, changes, worker in whole)
        gate.start = self._began[number] = self._now()
        self._began.pop(number - _REMEMBERED, None)
        self._opened, self._judging = number, True

    def _send(
        self, worker: int, number: int, job: int | None, changes: list[Tensor] | None, whole: bool
    ) -> None:
        rank = self._ranks[worker]
        plan = Plan(number, self._arrivals.plan[worker], self._coordinator.tag)
        try:
            if whole:
                everything = self._coordinator.whole()
                self._transport.isend(rank, message(Kind.WHOLE, number, 0, everything))
                self._attendance.sent_all(worker)
                job, changes = None, None
            tensors = [*plan.pack(), _numbers(job), *(changes or ())]
            accepted = self._attendance.accepted[worker]
            self._transport.isend(rank, message(Kind.ROUND, number, accepted, tensors))
        except PeerLost:
            return  # which its next message will say
        self._attendance.sent(worker, number)

    # What comes.

    def _wait(self) -> None:
        """Until the round may close.

        Raises:
            NotDecodable, RankFailure, TimeoutError: see :meth:`Coordinator.run`.
        """
        heard = self._transport.now()
        while True:
            now, silence = self._now(), self._transport.now() - heard
            if self._gate.stuck:
                self._despair()
                return
            closes_at = self._gate.closes_at(now)
            if closes_at <= now:
                return
            if silence > self._options.timeout_s:
                missing = [self._ranks[worker] for worker in sorted(self._gate.awaited)]
                raise TimeoutError(
                    f"workers of ranks {missing} sent nothing in round {self._rounds.number} for "
                    f"timeout_s={self._options.timeout_s:g} s; look at them, or raise it above the longest round"
                )
            if self._hear(min(closes_at - now, self._options.timeout_s - silence)):
                heard = self._transport.now()

    def _hear(self, seconds: float) -> bool:
        """Take what comes within so many seconds; whether anything did."""
        ready = self._receiver.wait(self._receiver.ranks, seconds + 1e-4)
        for rank in ready:
            self._take(rank)
        return bool(ready)

    def _take(self, rank: int) -> None:
        try:
            news = self._receiver.take(rank)
        except PeerLost as error:
            self._lose(rank, error)
            return
        if rank in self._place:
            self._take_of_worker(self._place[rank], news)
        elif news.kind in (Kind.NORMS, Kind.PART):
            self._others.take(rank, news)
        elif news.kind == Kind.GOT:
            if news.sequence == self._rounds.number:
                worker = self._place[news.version]
                self._arrivals.acknowledge(worker)
                self._arrive(worker)
        elif news.kind == Kind.GONE:
            self._lose(news.version, PeerLost(news.version, f"rank {rank} has lost it"))
        else:
            raise ProtocolError(rank, news, self._rounds.number)

    def _take_of_worker(self, worker: int, news: Message) -> None:
        number, now = news.sequence, self._now()
        wanted = news.kind in (Kind.RESULT, Kind.LATE) and 0 <= number <= self._rounds.number
        if not wanted or not self._attendance.may_answer(worker, number):
            raise ProtocolError(self._ranks[worker], news, self._rounds.number)
        back = worker in self._attendance.absent
        self._stats.returned += back
        self._attendance.answered(worker, number)
        finished = news.kind == Kind.RESULT or news.version == 1
        if number == self._rounds.number and news.kind == Kind.RESULT:
            self._arrivals.add(worker, news)
            self._arrive(worker)
            return
        self._stats.stale += 1
        if finished and number in self._began:
            self._rounds.observe_late(number, now - self._began[number])
        if back:
            self._welcome(worker)

    def _welcome(self, worker: int) -> None:
        """A worker that was to be sent no more is back. If it has missed a round, and its work can still count in this
        one, it gets its part of it; else the next one is its first."""
        if self._attendance.was_sent(worker, self._opened):
            self._attendance.sent_all(worker)  # it has missed nothing
            return
        now, dead = self._now(), self._attendance.dead
        if not self._judging or worker in dead or self._gate.closes_at(now) <= now:
            return
        number = self._rounds.number
        self._others.tell(message(Kind.WELCOME, number, 0, [_list([worker])]))
        self._send(worker, number, None, None, whole=True)

    def _arrive(self, worker: int) -> None:
        """A worker's vectors are here, all parts of them."""
        if not self._arrivals.is_complete(worker) or worker in self._attendance.dead:
            return
        if self._arrivals.report(worker).finite:
            self._gate.arrive(worker, self._now())
        else:
            self._stats.nonfinite += 1
            self._gate.refused.add(worker)

    def _lose(self, rank: int, error: PeerLost) -> None:
        if self._ending and isinstance(error, PeerClosed):
            return  # it has all, or has sent its part of the weights, while another's is waited for
        if rank in self._party.others:
            raise part_lost(error) from error
        if isinstance(error, PeerFailed) and self._options.on_worker_error == "raise":
            raise RankFailure(str(error)) from error
        worker = self._place[rank]
        if worker not in self._attendance.dead:
            self._attendance.dead.add(worker)
            self._stats.lost_workers.append(rank)

    def _despair(self) -> None:
        """Nobody else can come, and it is not enough. If only because of results that were not finite, the job is
        skipped.

        Raises:
            NotDecodable: the dead are needed.
        """
        missing = self._gate.late - self._gate.refused
        jobs = self._rounds.lost(missing, self._attendance.dead)
        if jobs:
            ranks = sorted(self._ranks[worker] for worker in missing)
            raise LostWorkers(jobs[0], ranks, self._rounds.number)

    # A round ends.

    def _close(self, before: float) -> float:
        """When it has; the round before had at ``before``."""
        rounds, gate, number = self._rounds, self._gate, self._rounds.number
        self._judging = False
        seconds = self._now() - gate.start
        awaited, late = rounds.awaited, gate.late
        for worker in range(rounds.num_workers):
            counts = self._stats.late if worker in late else self._stats.used
            counts[self._ranks[worker]] = counts.get(self._ranks[worker], 0) + 1
        self._stats.rounds += 1
        arrived = sorted(gate.arrived)
        self._attendance.accept(arrived, number)
        for worker in arrived:
            self._arrivals.keep(worker, self._coordinator.results)
        self._arrivals.merge_buffers(arrived, self._coordinator.buffers)
        due = rounds.close(late)
        self._others.tell(message(Kind.CLOSE, number, 0, [_list(sorted(late))]))
        if due is not None:
            closed = ClosedRound(
                number, awaited, gate.arrived, late, seconds, before, self._arrivals
            )
            if not self._settler.settle(due, closed) and rounds.keeps_dropped:
                self._attendance.accept(arrived, -1)  # nothing of it is in the weights
        return self._now()

    def _finish(self) -> None:
        """The last weights, to everybody. Whoever is busy with something long past is not waited for."""
        self._ending = True
        alive = self._attendance.alive
        self._others.tell(message(Kind.DONE, self._rounds.number, 0, [_list(alive)]))
        last = []
        for worker in alive:
            accepted, final = self._attendance.accepted[worker], self._coordinator.final()
            stop = message(Kind.STOP, self._rounds.number, accepted, final)
            try:
                sending = self._transport.isend(self._ranks[worker], stop)
            except PeerLost:
                continue
            if not self._attendance.is_busy(worker):
                last.append(sending)
        self._others.take_parts()
        self._transport.wait_all(last, self._options.timeout_s)


class LostWorkers(NotDecodable):
    """Workers whose processes have ended are needed.

    Attributes:
        job: that cannot be had.
        workers: ranks of those that are missing.
    """

    def __init__(self, job: int, ranks: Sequence[int], number: int) -> None:
        RuntimeError.__init__(
            self,
            f"the gradient of job {job} cannot be had in round {number} without the workers of ranks "
            f"{list(ranks)}, which are lost; resume from a checkpoint with the workers that are left, or choose a "
            "scheme that tolerates more",
        )
        self.job, self.workers = job, tuple(ranks)


def _list(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int64)


def _numbers(job: int | None) -> Tensor:
    return torch.tensor([-1 if job is None else job])

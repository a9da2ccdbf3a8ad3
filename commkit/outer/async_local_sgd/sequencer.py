"""The first server's loop: it decides what happens, and in which order."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...runtime.alarm import RankFailure
from ...transport import Message, PeerFailed, PeerLost, Pending
from .dispatch import Lease
from .protocol import Kind, Report, Stop, Task, message
from .stats import PushRecord

if TYPE_CHECKING:
    from .server import AsyncServer, OnPush

_LAST_WORDS_S = 2.0
_HOPELESS = 10  # pushes in a row and per worker that are not finite


class Sequencer:
    """
    Args:
        server: whose rule, dispatcher and transport it drives.
        pushes: see :meth:`AsyncServer.serve`, as the others.
    """

    def __init__(
        self,
        server: AsyncServer,
        pushes: int | None,
        steps: int | None,
        on_push: OnPush | None,
    ) -> None:
        self._server = server
        self._options = server.options
        self._party = server.party
        self._rule = server.rule
        self._dispatcher = server.dispatcher
        self._transport = server.transport
        self._stats = server.stats
        self._limits = (pushes, steps)
        self._on_push = on_push
        self._workers = set(server.party.workers)
        self._idle = list(server.party.workers)
        self._window: float | None = time.monotonic() - server.options.grace_s
        self._pushed: dict[int, tuple[int, Message]] = {}  # by lease, until decided
        self._acknowledged: dict[int, int] = {}
        self._accepted: dict[int, int] = {}  # the last lease of each worker
        self._poisoned = 0  # pushes in a row that were not finite
        self._pending: dict[int, Pending] = {}

    def run(self) -> None:
        for rank in (*self._party.workers, *self._party.others):
            self._pending[rank] = self._transport.irecv(rank)
        heard = time.monotonic()
        while not self._reached():
            self._hand_out(time.monotonic())
            ranks = list(self._pending)
            ready = self._transport.wait_some(
                [self._pending[rank] for rank in ranks], self._patience(heard)
            )
            for place in ready:
                if not self._reached():
                    self._hear(ranks[place])
            now = time.monotonic()
            heard = now if ready else heard
            self._expire(now)
            if not self._workers:
                self._hear_last_words()
                raise RankFailure(
                    f"no worker is left after {self._stats.pushes} pushes; resume from a checkpoint"
                )
            if now - heard > self._options.timeout_s:
                raise TimeoutError(
                    f"workers {sorted(self._workers)} sent nothing for timeout_s={self._options.timeout_s:g} s; "
                    "look at them, or raise it above the longest task"
                )
        self._finish()

    # What comes.

    def _hear(self, rank: int) -> None:
        try:
            news = self._pending[rank].result()
        except PeerLost as error:
            del self._pending[rank]
            self._lose(rank, error)
            return
        self._pending[rank] = self._transport.irecv(rank)
        lease = news.sequence
        if rank in self._party.workers and rank not in self._workers:
            return  # another server has lost it, so it could not be given all of the weights
        if news.kind == Kind.PUSH:
            self._pushed[lease] = (rank, news)
        elif news.kind == Kind.GOT:
            self._acknowledged[lease] = self._acknowledged.get(lease, 0) + 1
        elif news.kind == Kind.GONE:
            worker = news.sequence
            self._lose(worker, PeerLost(worker, f"rank {rank} has lost it"))
            return
        if lease in self._pushed and self._acknowledged.get(lease, 0) == len(self._party.others):
            self._acknowledged.pop(lease, None)
            self._decide(*self._pushed.pop(lease))

    def _hear_last_words(self) -> None:
        """A server that fails tells everybody, and workers may have left before its news came here."""
        end = time.monotonic() + _LAST_WORDS_S
        while others := [rank for rank in self._party.others if rank in self._pending]:
            ready = self._transport.wait_some(
                [self._pending[rank] for rank in others], max(0.0, end - time.monotonic())
            )
            if not ready:
                return
            for place in ready:
                self._hear(others[place])

    def _decide(self, worker: int, push: Message) -> None:
        """A push is here, all parts of it."""
        now = time.monotonic()
        report = Report.unpack(push.tensors[0])
        lease = self._dispatcher.leases.get(push.sequence)
        if lease is None:
            self._stats.late += 1
            self._tell(message(Kind.DROP, push.sequence))
        else:
            self._dispatcher.measure(lease, report.steps, report.seconds, now)
            self._apply(lease, report, list(push.tensors[1:]))
        if self._window is None:
            self._window = now
        self._idle.append(worker)

    def _apply(self, lease: Lease, report: Report, tensors: list[Tensor]) -> None:
        rule, stats = self._rule, self._stats
        staleness = rule.version - lease.version
        buffers, payload = (
            tensors[: len(self._server.buffers)],
            tensors[len(self._server.buffers) :],
        )
        accepted = report.finite and rule.push(
            self._party.codec.decode(payload, self._server.names, lease.number), staleness
        )
        if not accepted:
            self._tell(message(Kind.DROP, lease.number))
            self._refuse(lease, report, staleness)
            return
        self._poisoned = 0
        self._accepted[lease.worker] = lease.number
        self._dispatcher.settle(lease, report.steps)
        self._server.merge_buffers(buffers)
        record = PushRecord(
            rule.pushes,
            lease.number,
            lease.worker,
            lease.shard,
            lease.first_step,
            report.steps,
            staleness,
            rule.version,
            report.seconds,
            None if math.isnan(report.loss) else report.loss,
        )
        stats.count(record)
        self._tell(message(Kind.ORDER, lease.number, rule.version, [record.pack()]))
        if self._on_push is not None:
            self._on_push(record)

    def _refuse(self, lease: Lease, report: Report, staleness: int) -> None:
        if report.finite and not self._rule.admits(staleness):
            self._stats.too_stale += 1
            self._dispatcher.give_up(lease)
            return
        # Its shard moves on: data that poisons every worker must not come back for ever.
        self._stats.nonfinite += 1
        self._dispatcher.settle(lease, report.steps)
        self._poisoned += 1
        if self._poisoned >= _HOPELESS * len(self._workers):
            raise FloatingPointError(
                f"the last {self._poisoned} pushes held inf or NaN; lower the inner learning rate, or resume from "
                "a checkpoint"
            )

    def _lose(self, rank: int, error: PeerLost) -> None:
        if rank in self._party.others:
            raise RankFailure(f"{error}; it held a part of the weights") from error
        if isinstance(error, PeerFailed) and self._options.on_worker_error == "raise":
            raise RankFailure(str(error)) from error
        if rank not in self._workers:
            return
        self._workers.remove(rank)
        self._idle = [worker for worker in self._idle if worker != rank]
        self._window = self._window if self._idle else None
        self._stats.lost_workers.append(rank)
        leases = {lease.number for lease in self._dispatcher.of_worker(rank)}
        for lease in self._dispatcher.of_worker(rank):
            self._dispatcher.give_up(lease)
        leases |= {number for number, (worker, _) in self._pushed.items() if worker == rank}
        for number in leases:
            self._pushed.pop(number, None)
            self._tell(message(Kind.DROP, number))
        self._dispatcher.forget(rank)

    def _expire(self, now: float) -> None:
        for lease in self._dispatcher.expired(now):
            self._stats.expired += 1
            self._dispatcher.give_up(lease)

    # What goes out.

    def _hand_out(self, now: float) -> None:
        """The weights, to everybody who has nothing to do, when the grace period is over or nobody is out."""
        if not self._idle or self._window is None:
            return
        if self._dispatcher.leases and now < self._window + self._options.grace_s:
            return
        version = self._rule.version
        for worker in self._idle:
            lease = self._dispatcher.grant(worker, version, now)
            task = Task(
                lease.shard, lease.steps, lease.first_step, self._accepted.pop(worker, -1), False
            )
            self._send_task(worker, lease.number, task, Stop.NO)
        self._idle, self._window = [], None

    def _finish(self) -> None:
        """The last weights, to everybody. A worker whose lease expired may be stuck: nobody waits for it."""
        self._rule.flush()
        waited_for = {*self._idle, *(lease.worker for lease in self._dispatcher.leases.values())}
        last = []
        for worker in sorted(self._workers):
            task = Task(0, 0, 0, self._accepted.pop(worker, -1), True)
            stop = Stop.WAITED_FOR if worker in waited_for else Stop.YES
            sending = self._send_task(worker, self._dispatcher.next_number(), task, stop)
            if sending is not None and stop == Stop.WAITED_FOR:
                last.append(sending)
        self._tell(message(Kind.DONE, 0))
        self._transport.wait_all(last, self._options.timeout_s)

    def _send_task(self, worker: int, number: int, task: Task, stop: Stop) -> Pending | None:
        tensors = [task.pack(), *self._server.outgoing(), *self._server.buffers.values()]
        try:
            sending = self._transport.isend(
                worker, message(Kind.TASK, number, self._rule.version, tensors)
            )
        except PeerLost:
            return None  # which its next message will say
        whom = torch.tensor([worker, stop])
        self._tell(message(Kind.HAND, number, self._rule.version, [whom]))
        return sending

    def _tell(self, news: Message) -> None:
        """The other servers, in one sequence for all."""
        for rank in self._party.others:
            try:
                self._transport.isend(rank, news)
            except PeerLost as error:
                raise RankFailure(f"{error}; it held a part of the weights") from error

    def _reached(self) -> bool:
        pushes, steps = self._limits
        return (pushes is not None and self._rule.pushes >= pushes) or (
            steps is not None and self._stats.steps >= steps
        )

    def _patience(self, heard: float) -> float:
        """Seconds until something is due."""
        due = [heard + self._options.timeout_s]
        due += [lease.deadline for lease in self._dispatcher.leases.values()]
        if self._idle and self._window is not None:
            due.append(self._window + self._options.grace_s)
        return max(0.001, min(due) - time.monotonic() + 0.001)

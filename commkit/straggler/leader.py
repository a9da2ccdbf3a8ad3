"""The first coordinator's loop: it opens rounds, judges who is late, and decides what happens in which order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..runtime.alarm import RankFailure
from ..transport import Message, PeerClosed, PeerFailed, PeerLost, Pending
from .backup import StepResult
from .gate import Gate
from .protocol import Kind, Plan, ProtocolError, Report, message
from .record import StepRecord
from .results import Result
from .rounds import Due
from .schedule import MiniTask, NotDecodable

if TYPE_CHECKING:
    from .coordinator import Coordinator, OnStep

_HOPELESS = 10  # jobs in a row that could not be had
_REMEMBERED = 64  # rounds whose beginning is known, for those who come late


class _Arrival(NamedTuple):
    report: Report
    message: Message


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
        self._on_step = on_step
        self._whole_at = whole_at or (lambda job: False)
        self._ranks = coordinator.party.workers  # by worker
        self._place = {rank: worker for worker, rank in enumerate(self._ranks)}
        self._dead: set[int] = set()  # workers, as all sets here
        self._behind = dict.fromkeys(range(len(self._ranks)), 0)  # rounds sent and not answered
        self._absent = set(self._behind)  # are sent nothing, or everything: so it begins
        self._accepted = dict.fromkeys(self._behind, -1)  # the last round each was in time for
        self._answered = dict.fromkeys(self._behind, -1)  # the last round each answered
        self._told = dict.fromkeys(self._behind, -1)  # the last round each was sent
        self._pending: dict[int, Pending] = {}  # by rank
        self._news: dict[int, list[Message]] = {rank: [] for rank in self._party.others}
        self._began: dict[int, float] = {}  # when each round did
        self._poisoned = 0  # jobs in a row that could not be had
        self._ending = False
        # Of the round that is under way.
        self._plan: tuple[tuple[MiniTask, ...], ...] = ()
        self._results: dict[int, _Arrival] = {}
        self._acknowledged: dict[int, int] = {}
        self._opened = -1  # the last round
        self._judging = False  # whether it is open

    @property
    def _gate(self) -> Gate:
        return self._coordinator.gate

    def run(self) -> None:
        for rank in (*self._ranks, *self._party.others):
            self._pending[rank] = self._transport.irecv(rank)
        last = self._now()
        while not self._rounds.ended:
            job = self._rounds.job
            self._open(job)
            self._wait()
            last = self._close(last)
        self._finish()

    # A round begins.

    def _open(self, job: int | None) -> None:
        rounds, coordinator = self._rounds, self._coordinator
        number = rounds.number
        self._plan = rounds.plan()
        self._results, self._acknowledged = {}, {}
        gate = coordinator.gate = Gate(rounds, self._options.grace_s, self._now(), self._dead)
        changes = coordinator.begin(job)
        told: list[int] = []
        whole: list[int] = []
        for worker in self._behind:
            if worker in self._dead:
                continue
            if worker in self._absent and self._behind[worker]:
                continue  # it is busy with something long past
            (whole if worker in self._absent else told).append(worker)
        self._tell(message(Kind.TELL, number, 0, [_numbers(job), _list(told), _list(whole)]))
        for worker in (*told, *whole):
            self._send(worker, number, job, changes, worker in whole)
        gate.start = self._began[number] = self._now()
        self._began.pop(number - _REMEMBERED, None)
        self._opened, self._judging = number, True

    def _send(
        self, worker: int, number: int, job: int | None, changes: list[Tensor] | None, whole: bool
    ) -> None:
        rank = self._ranks[worker]
        plan = Plan(number, self._plan[worker], self._coordinator.tag)
        try:
            if whole:
                everything = self._coordinator.whole()
                self._transport.isend(rank, message(Kind.WHOLE, number, 0, everything))
                self._absent.discard(worker)
                job, changes = None, None
            tensors = [*plan.pack(), _numbers(job), *(changes or ())]
            self._transport.isend(
                rank, message(Kind.ROUND, number, self._accepted[worker], tensors)
            )
        except PeerLost:
            return  # which its next message will say
        self._told[worker] = number
        self._behind[worker] += 1
        if self._behind[worker] >= self._options.max_behind:
            self._absent.add(worker)

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
        ranks = list(self._pending)
        ready = self._transport.wait_some([self._pending[rank] for rank in ranks], seconds + 1e-4)
        for place in ready:
            self._take(ranks[place])
        return bool(ready)

    def _take(self, rank: int) -> None:
        try:
            news = self._pending[rank].result()
        except PeerLost as error:
            del self._pending[rank]
            self._lose(rank, error)
            return
        self._pending[rank] = self._transport.irecv(rank)
        if rank in self._place:
            self._take_of_worker(self._place[rank], news)
        elif news.kind in (Kind.NORMS, Kind.PART):
            self._news[rank].append(news)
        elif news.kind == Kind.GOT:
            if news.sequence == self._rounds.number:
                worker = self._place[news.version]
                self._acknowledged[worker] = self._acknowledged.get(worker, 0) + 1
                self._arrive(worker)
        elif news.kind == Kind.GONE:
            self._lose(news.version, PeerLost(news.version, f"rank {rank} has lost it"))
        else:
            raise ProtocolError(rank, news, self._rounds.number)

    def _take_of_worker(self, worker: int, news: Message) -> None:
        number, now = news.sequence, self._now()
        wanted = news.kind in (Kind.RESULT, Kind.LATE) and 0 <= number <= self._rounds.number
        if not wanted or number <= self._answered[worker]:
            raise ProtocolError(self._ranks[worker], news, self._rounds.number)
        back = worker in self._absent
        self._stats.returned += back
        self._behind[worker] = 0  # older rounds it will not answer any more
        self._answered[worker] = number
        finished = news.kind == Kind.RESULT or news.version == 1
        if number == self._rounds.number and news.kind == Kind.RESULT:
            self._results[worker] = _Arrival(Report.unpack(news.tensors[0]), news)
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
        if self._told[worker] == self._opened:
            self._absent.discard(worker)  # it has missed nothing
            return
        now = self._now()
        if not self._judging or worker in self._dead or self._gate.closes_at(now) <= now:
            return
        number = self._rounds.number
        self._tell(message(Kind.WELCOME, number, 0, [_list([worker])]))
        self._send(worker, number, None, None, whole=True)

    def _arrive(self, worker: int) -> None:
        """A worker's vectors are here, all parts of them."""
        if self._acknowledged.get(worker, 0) < len(self._party.others):
            return
        if worker not in self._results or worker in self._dead:
            return
        if self._results[worker].report.finite:
            self._gate.arrive(worker, self._now())
        else:
            self._stats.nonfinite += 1
            self._gate.refused.add(worker)

    def _lose(self, rank: int, error: PeerLost) -> None:
        if self._ending and isinstance(error, PeerClosed):
            return  # it has all, or has sent its part of the weights, while another's is waited for
        if rank in self._party.others:
            raise RankFailure(f"{error}; it held a part of the weights") from error
        if isinstance(error, PeerFailed) and self._options.on_worker_error == "raise":
            raise RankFailure(str(error)) from error
        worker = self._place[rank]
        if worker not in self._dead:
            self._dead.add(worker)
            self._stats.lost_workers.append(rank)

    def _despair(self) -> None:
        """Nobody else can come, and it is not enough. If only because of results that were not finite, the job is
        skipped.

        Raises:
            NotDecodable: the dead are needed.
        """
        missing = self._gate.late - self._gate.refused
        jobs = self._rounds.lost(missing, self._dead)
        if jobs:
            ranks = sorted(self._ranks[worker] for worker in missing)
            raise LostWorkers(jobs[0], ranks, self._rounds.number)

    # A round ends.

    def _close(self, last: float) -> float:
        rounds, gate, number = self._rounds, self._gate, self._rounds.number
        self._judging = False
        seconds = self._now() - gate.start
        awaited, late = rounds.awaited, gate.late
        for worker in range(rounds.num_workers):
            counts = self._stats.late if worker in late else self._stats.used
            counts[self._ranks[worker]] = counts.get(self._ranks[worker], 0) + 1
        self._stats.rounds += 1
        for worker in sorted(gate.arrived):
            self._accepted[worker] = number
            arrival = self._results[worker]
            keep_results(self._coordinator, self._plan[worker], arrival.message, arrival.report, 1)
        self._merge_buffers(sorted(gate.arrived))
        due = rounds.close(late)
        self._tell(message(Kind.CLOSE, number, 0, [_list(sorted(late))]))
        compute = [self._results[worker].report.seconds for worker in gate.arrived]
        took = median(compute) if compute else math.nan
        if due is not None:
            self._settle(due, number, awaited, late, seconds, took, last)
        return self._now()

    def _settle(
        self,
        due: Due,
        number: int,
        awaited: int | None,
        late: set[int],
        seconds: float,
        took: float,
        last: float,
    ) -> None:
        """A job is due: put its gradient together, step, and report."""
        coordinator, model = self._coordinator, self._coordinator.model_of(due.job)
        loss = math.nan
        if due.weights is not None:
            loss = coordinator.results.loss(due.job, due.weights)
        outcome = coordinator.combine(due)
        norms = self._gather_norms(outcome.norms)
        total = [math.fsum(row) for row in norms.tolist()]
        norm = math.sqrt(total[0])
        skipped = outcome.gradient is None or not math.isfinite(norm)
        scale = 0.0 if skipped else coordinator.scale(norm)
        whole = self._whole_at(due.job)
        lr = float(coordinator.optimizers[model].param_groups[0]["lr"])
        self._tell(
            message(
                Kind.STEP,
                number,
                0,
                [torch.tensor([scale, norm, skipped, whole], dtype=torch.float64)],
            )
        )
        if outcome.gradient is not None and not skipped:
            coordinator.apply(due.job, outcome.gradient, scale)
            lr = float(coordinator.optimizers[model].param_groups[0]["lr"])
            self._poisoned = 0
            self._stats.steps += 1
            self._observe(due, awaited, total, lr)
        else:
            self._stats.skipped += 1
            self._poisoned += 1
            if self._rounds.keeps_dropped:  # nothing of it is in the weights
                self._accepted.update(dict.fromkeys(self._gate.arrived, -1))
        if self._poisoned >= _HOPELESS:
            raise FloatingPointError(
                f"the gradients of the last {self._poisoned} jobs held inf or NaN, or lacked those that did; lower "
                "the learning rate, or resume from a checkpoint"
            )
        if whole:
            self._take_parts()
        if self._on_step is not None:
            workers = sorted({worker for worker, _ in due.weights or {}})
            now = self._now()
            self._on_step(
                StepRecord(
                    due.job,
                    model,
                    due.job // len(coordinator.models),
                    loss,
                    tuple(self._ranks[worker] for worker in workers),
                    tuple(self._ranks[worker] for worker in sorted(late)),
                    awaited,
                    seconds,
                    now - last,
                    took,
                    norm,
                    skipped,
                )
            )

    def _observe(self, due: Due, awaited: int | None, norms: list[float], lr: float) -> None:
        """Tell the scheme how it went, if it wants to know."""
        if not self._rounds.wants_norms or awaited is None or due.weights is None:
            return
        places = {worker: place for place, worker in enumerate(sorted(self._gate.arrived), 1)}
        order = list(self._gate.arrived)
        self._rounds.observe(
            StepResult(
                due.job,
                awaited,
                tuple(order),
                tuple(self._gate.arrived.values()),
                tuple(norms[places[worker]] for worker in order),
                norms[0],
                tuple(self._loss_of(worker) for worker in order),
                lr,
            )
        )

    def _loss_of(self, worker: int) -> float:
        return sum(self._results[worker].report.losses)

    def _gather_norms(self, own: Tensor) -> Tensor:
        """Of all parts, with parameters in the model's order, so that sums do not depend on who holds them."""
        if not self._party.others:
            return own
        columns = dict(zip(self._coordinator.names, own.T, strict=True))
        for rank in self._party.others:
            (news,) = self._next_of(rank, Kind.NORMS).tensors
            columns |= dict(zip(self._party.parts[rank], news.T, strict=True))
        return torch.stack([columns[name] for name in self._party.parameters], dim=1)

    def _take_parts(self) -> None:
        for rank in self._party.others:
            self._coordinator.take_part(rank, self._next_of(rank, Kind.PART).tensors)
        self._coordinator.write_buffers()

    def _next_of(self, rank: int, kind: Kind) -> Message:
        """The next message of another coordinator; what workers send meanwhile is taken, too."""
        end = self._transport.now() + self._options.timeout_s
        while not self._news[rank]:
            if rank not in self._pending:
                raise RankFailure(
                    f"coordinator rank {rank} has left without its part of the weights"
                )
            left = end - self._transport.now()
            if left <= 0:
                raise TimeoutError(
                    f"coordinator rank {rank} sent nothing for timeout_s={self._options.timeout_s:g} s"
                )
            self._hear(left)
        news = self._news[rank].pop(0)
        if news.kind != kind:
            raise ProtocolError(rank, news, self._rounds.number)
        return news

    def _merge_buffers(self, workers: Sequence[int]) -> None:
        """Batch-norm statistics: the mean over the workers that were in time."""
        buffers = self._coordinator.buffers
        arrived = [self._results[w].message.tensors[1 : 1 + len(buffers)] for w in workers]
        if not arrived:
            return
        for place, (name, b) in enumerate(buffers.items()):
            theirs = [tensors[place] for tensors in arrived]
            if b.is_floating_point():
                b.copy_(torch.stack([x.double() for x in theirs]).mean(0))
            elif name.endswith("num_batches_tracked"):
                b.copy_(torch.stack(theirs).amax(0))
            else:
                b.copy_(theirs[0])

    def _finish(self) -> None:
        """The last weights, to everybody. Whoever is busy with something long past is not waited for."""
        self._ending = True
        self._tell(message(Kind.DONE, self._rounds.number, 0, [_list(self._alive())]))
        last = []
        for worker in self._alive():
            stop = message(
                Kind.STOP, self._rounds.number, self._accepted[worker], self._coordinator.final()
            )
            try:
                sending = self._transport.isend(self._ranks[worker], stop)
            except PeerLost:
                continue
            if not self._behind[worker]:
                last.append(sending)
        self._take_parts()
        self._transport.wait_all(last, self._options.timeout_s)

    def _alive(self) -> list[int]:
        return [worker for worker in self._behind if worker not in self._dead]

    def _tell(self, news: Message) -> None:
        """The other coordinators, in one sequence for all."""
        for rank in self._party.others:
            try:
                self._transport.isend(rank, news)
            except PeerLost as error:
                raise RankFailure(f"{error}; it held a part of the weights") from error


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


def keep_results(
    coordinator: Coordinator,
    plan: Sequence[MiniTask],
    news: Message,
    report: Report,
    skip: int,
) -> None:
    """Take in one worker's vectors, ``skip`` tensors (and the buffers, on the first coordinator) into its message."""
    tensors = list(news.tensors[skip:])
    if coordinator.is_first:
        tensors = tensors[len(coordinator.buffers) :]
    at = 0
    for place, task in enumerate(plan):
        size = 1 + int(tensors[at].sum())
        result = Result(
            news.sequence,
            tuple(tensors[at : at + size]),
            report.losses[place],
        )
        at += size
        key = (task.job, task.worker, task.index)
        if task.coded:
            coordinator.results.keep(key, result)
        else:
            coordinator.results.add(key, result)


def _list(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int64)


def _numbers(job: int | None) -> Tensor:
    return torch.tensor([-1 if job is None else job])

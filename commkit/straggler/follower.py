"""The loop of a coordinator that is not the first: it does what the first one says, in the order in which it says so."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch

from ..runtime.alarm import RankFailure
from ..transport import Message, PeerLost, Pending
from .arrivals import Arrivals
from .coordinator import Outcome
from .protocol import Kind, ProtocolError, message
from .receiver import Receiver
from .record import StepRecord
from .rounds import Due

if TYPE_CHECKING:
    from .coordinator import Coordinator, OnStep


class Follower:
    """
    Args:
        coordinator: whose weights, scheme and transport it drives.
        on_step: see :meth:`Coordinator.run`.
    """

    def __init__(self, coordinator: Coordinator, on_step: OnStep | None) -> None:
        self._coordinator = coordinator
        self._party = coordinator.party
        self._rounds = coordinator.rounds
        self._transport = coordinator.transport
        self._timeout_s = coordinator.options.timeout_s
        self._on_step = on_step
        self._ranks = coordinator.party.workers
        self._receiver = Receiver(self._transport, (self._party.first, *self._ranks))
        self._last: list[Pending] = []  # final weights on their way
        self._arrivals = Arrivals()  # of this round
        self._due: Due | None = None
        self._outcome: Outcome | None = None
        self._late: tuple[int, ...] = ()
        self._began = self._ended = time.monotonic()

    def run(self) -> None:
        while True:
            ready = self._receiver.wait(self._receiver.ranks, self._timeout_s)
            if not ready:
                raise TimeoutError(
                    f"rank {self._party.first} and the workers sent nothing for "
                    f"timeout_s={self._timeout_s:g} s"
                )
            for rank in ready:
                if self._hear(rank):
                    self._transport.wait_all(self._last, self._timeout_s)
                    return

    def _hear(self, rank: int) -> bool:
        """Whether this was the end."""
        try:
            news = self._receiver.take(rank)
        except PeerLost as error:
            if rank == self._party.first:
                raise RankFailure(str(error)) from error
            self._say(message(Kind.GONE, self._rounds.number, rank))
            return False
        if rank == self._party.first:
            return self._obey(news)
        if news.kind != Kind.RESULT or news.sequence > self._rounds.number:
            raise ProtocolError(rank, news, self._rounds.number)
        if news.sequence == self._rounds.number:
            self._arrivals.add(self._ranks.index(rank), news)
            self._say(message(Kind.GOT, news.sequence, rank))
        return False

    def _obey(self, news: Message) -> bool:
        kinds = {
            Kind.TELL: self._open,
            Kind.WELCOME: self._welcome,
            Kind.CLOSE: self._close,
            Kind.STEP: self._step,
            Kind.DONE: self._finish,
        }
        if news.kind not in kinds:
            raise ProtocolError(self._party.first, news, self._rounds.number)
        kinds[Kind(news.kind)](news)
        return news.kind == Kind.DONE

    def _open(self, news: Message) -> None:
        """A round begins: send this part of the weights."""
        number, coordinator = self._rounds.number, self._coordinator
        job = int(news.tensors[0])
        told, whole = (x.tolist() for x in news.tensors[1:])
        if job < 0 and self._rounds.job is not None:
            self._rounds.limit(0)  # the first one was stopped
        if news.sequence != number or (self._rounds.job if job >= 0 else -1) != job:
            raise RuntimeError(
                f"rank {self._party.first} is in round {news.sequence} and this one in round {number}; resume all "
                "coordinators from checkpoints of the same step"
            )
        self._arrivals = Arrivals(self._rounds.plan())
        self._began = time.monotonic()
        changes = coordinator.begin(None if job < 0 else job)
        for worker in told:
            part = message(Kind.PART, number, 0, [news.tensors[0], *(changes or ())])
            self._send(worker, part)
        self._send_whole(whole)

    def _welcome(self, news: Message) -> None:
        self._send_whole(news.tensors[0].tolist())

    def _send_whole(self, workers: list[int]) -> None:
        number, coordinator = self._rounds.number, self._coordinator
        for worker in workers:
            self._send(worker, message(Kind.WHOLE, number, 0, coordinator.whole()))
            self._send(worker, message(Kind.PART, number, 0, [torch.tensor([-1])]))

    def _close(self, news: Message) -> None:
        """The round is over; say what came out of it."""
        coordinator = self._coordinator
        late = set(news.tensors[0].tolist())
        self._late = tuple(self._ranks[worker] for worker in sorted(late))
        for worker in self._arrivals.workers:
            if worker not in late:
                self._arrivals.keep(worker, coordinator.results)
        self._due = self._rounds.close(late)
        if self._due is not None:
            self._outcome = coordinator.combine(self._due)
            self._say(message(Kind.NORMS, news.sequence, 0, [self._outcome.norms]))

    def _step(self, news: Message) -> None:
        coordinator, due, outcome = self._coordinator, self._due, self._outcome
        assert due is not None
        assert outcome is not None
        scale, norm, skipped, whole = news.tensors[0].tolist()
        if not skipped:
            assert outcome.gradient is not None
            coordinator.apply(due.job, outcome.gradient, scale)
        if whole:
            self._hand_over(news.sequence)
        if self._on_step is not None:
            now, model = time.monotonic(), coordinator.model_of(due.job)
            workers = sorted({worker for worker, _ in due.weights or {}})
            self._on_step(
                StepRecord(
                    due.job,
                    model,
                    due.job // len(coordinator.models),
                    math.nan,
                    tuple(self._ranks[worker] for worker in workers),
                    self._late,
                    self._rounds.awaited,
                    now - self._began,
                    now - self._ended,
                    math.nan,
                    norm,
                    bool(skipped),
                )
            )
        self._ended = time.monotonic()

    def _finish(self, news: Message) -> None:
        final = self._coordinator.final()
        for worker in news.tensors[0].tolist():
            self._send(worker, message(Kind.STOP, news.sequence, 0, final), last=True)
        self._hand_over(news.sequence)

    def _hand_over(self, number: int) -> None:
        """This part of the weights, to the first coordinator."""
        self._say(message(Kind.PART, number, 0, self._coordinator.final()))

    def _send(self, worker: int, news: Message, last: bool = False) -> None:
        try:
            sending = self._transport.isend(self._ranks[worker], news)
        except PeerLost:
            return  # the first coordinator will hear of it
        if last:
            self._last.append(sending)

    def _say(self, news: Message) -> None:
        try:
            self._transport.isend(self._party.first, news)
        except PeerLost:
            pass  # why, its next message says

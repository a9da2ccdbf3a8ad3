"""The ranks that compute gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..aggregators.health import are_finite
from ..runtime.agreement import mark_attached, refuse_attached, unmark_attached, wrapped_in_ddp
from ..runtime.session import Session
from ..transport import Message, Network, PeerLost, TorchNetwork, Transport
from ..types import ByteCounter
from .computation import Computation, LossOf
from .inbox import Inbox
from .methods import Method
from .options import CoordinationOptions
from .partitions import BatchLayout
from .protocol import PLAN_TENSORS, Kind, Party, Plan, ProtocolError, Report, message
from .residuals import Residuals
from .ring import Ring


class Worker(Session):
    """Computes what the coordinator's plan says, round by round. See :class:`Coordinator` for an example.

    Between rounds it takes every message of the coordinators in order, so that its weights have the bits of everybody
    else's, but computes only the newest round: after a pause it fast-forwards.

    State: T + 1 copies of the weights, 4 bytes per parameter for each residual (T + 1 of them) if the compressor
    leaves something unsent, and a gradient.

    Args:
        model: a module of the same architecture as the coordinators', not in DistributedDataParallel.
        method: the same on all ranks, as ``options`` and ``batch``; see :class:`Coordinator`.
        network: all ranks; None is the default process group.
        on_save: called with a number when the coordinator asks for this worker's state to be saved under it.

    Attributes:
        round: the last round that it took part in.
        in_time, dropped: rounds that it was in time for, and that it was late for after it had sent its vectors.
        abandoned: rounds that were over before it was done.
        skipped: rounds that it passed over to catch up.

    Raises:
        ValueError: this rank is a coordinator, or a number does not fit.
        RuntimeError: torch.distributed is not initialised.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        options: CoordinationOptions | None = None,
        *,
        batch: int,
        network: Network | None = None,
        on_save: Callable[[int], None] | None = None,
    ) -> None:
        self.options = CoordinationOptions() if options is None else options
        self.model, self.method, self.on_save = model, method, on_save
        network = TorchNetwork() if network is None else network
        self.party = Party(model, self.options, network)
        party = self.party
        if party.rank in self.options.coordinators:
            raise ValueError(
                f"rank {party.rank} is in coordinators={self.options.coordinators}; make a Coordinator there"
            )
        rounds = method.build(len(party.workers))
        self.layout = BatchLayout(batch, rounds.num_units)
        num_models = rounds.delay + 1 if self.options.interleave == "models" else 1
        weights = [party.parameters] * (rounds.delay + 1)
        self.ring = Ring(party.weights, rounds.delay, num_models == 1, weights)
        self._computation = Computation(party, self.ring, self.layout, num_models)
        keep = rounds.keeps_dropped and self.options.keep_dropped
        if self.options.keep_dropped is None:
            keep = rounds.keeps_dropped and self.options.compressor is not None
        self.residuals = Residuals(party.gradients, rounds.delay + 1, bool(keep))
        self.round = -1
        self.in_time = self.dropped = self.abandoned = self.skipped = 0
        self.seconds = 0.0  # of the last round's computing
        self._sent = -1  # the round whose fate is not known
        self._saved = 0  # tag of the last state
        self._running = False
        self._transport: Transport | None = None
        self._inbox: Inbox | None = None

    def __enter__(self) -> Self:
        return self if self._transport is not None else self.start()

    @property
    def sent(self) -> ByteCounter:
        """What this worker has sent."""
        assert self._transport is not None
        return self._transport.sent

    def kept_tensors(self) -> list[Tensor]:
        """What this worker keeps between rounds, besides the model."""
        weights = [x for mine in self.ring.sets for x in mine.values()]
        return [*weights, *self.residuals.tensors()]

    def start(self) -> Self:
        """Meet all other ranks. Collective.

        Raises:
            RuntimeError: ranks disagree (the differing field is named), the model is attached to something else, or a
                DistributedDataParallel averages its gradients.
        """
        error: Exception | None = None
        try:
            refuse_attached(self.model)
            if wrapped_in_ddp(self.party.parameters.values()) is not None:
                raise RuntimeError(
                    "a DistributedDataParallel around this model averages gradients with other ranks, which here is the "
                    "coordinator's business; give Worker a plain module"
                )
        except Exception as refusal:
            error = refusal
        self._transport = self.party.join(
            error, self.options.coordinators, self.method.spec() | {"batch": self.layout.batch}
        )
        self._inbox = Inbox(self._transport, self.options.coordinators, self.options.timeout_s)
        mark_attached(self.model)
        self._running = True
        return self

    def close(self, error: str | None = None) -> None:
        """Leave: for the coordinators this worker is a straggler from now on. With ``error`` they are told why, and by
        ``options.on_worker_error`` end the training."""
        if self._transport is None:
            return
        unmark_attached(self.model)
        self._running = False
        self._transport.close(error)

    def run(self, loss_of: LossOf) -> None:
        """Compute until the coordinator has had enough; the model then holds the final weights.

        Args:
            loss_of: the mean loss of a share's samples, a scalar to differentiate, for the model as it is then. None if
                it gave up because the share was superseded. It depends on the share and the weights alone.

        Raises:
            RankFailure: a coordinator failed, or another worker made it fail.
            TimeoutError: nothing came for ``options.timeout_s``.
        """
        while (plan := self._next_plan()) is not None:
            began = time.perf_counter()
            vectors, report = self._compute(plan, loss_of, began)
            if vectors is None or self._superseded(plan.round):
                self._give_up(plan, vectors)
            else:
                self._send(plan, vectors, report)

    def state_dict(self) -> dict[str, Any]:
        """What the compressor has left unsent on this rank."""
        return {"residuals": self.residuals.state_dict(), "saved": self._saved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.residuals.load_state_dict(state["residuals"])
        self._saved = state["saved"]

    # Computing.

    def _compute(
        self, plan: Plan, loss_of: LossOf, began: float
    ) -> tuple[list[dict[str, Tensor]] | None, Report]:
        """The vectors of a plan; None if it was given up."""

        def superseded() -> bool:
            return self.options.interrupt and self._superseded(plan.round)

        vectors, losses = [], []
        for task in plan.tasks:
            vector, loss = self._computation.vector(task, loss_of, superseded)
            if vector is None:
                return None, Report(0.0, True, ())
            vectors.append(vector)
            losses.append(loss)
        if any(p.device.type == "cuda" for p in self.party.parameters.values()):
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - began
        finite = are_finite(x for vector in vectors for x in vector.values())
        return vectors, Report(self.seconds, finite, tuple(losses))

    def _save(self, tag: int) -> None:
        if tag > self._saved:
            self._saved = tag
            if self.on_save is not None:
                self.on_save(tag)

    # Sending.

    def _send(self, plan: Plan, vectors: list[dict[str, Tensor]], report: Report) -> None:
        """To each coordinator its part of every vector."""
        payloads: dict[int, list[Tensor]] = {rank: [] for rank in self.options.coordinators}
        if report.finite:
            self.residuals.stage(plan.round, [task.job for task in plan.tasks])
            for rank, names in self.party.parts.items():
                for place, vector in enumerate(vectors):
                    payloads[rank] += self.residuals.encode(place, vector, names, self.party.rank)
            # What overflowed in the code must not reach some coordinators and be dropped by others.
            finite = are_finite(x for payload in payloads.values() for x in payload)
            report = report._replace(finite=finite)
        if not report.finite:
            self.residuals.refuse()
        for rank in self.options.coordinators:
            tensors = [report.pack()]
            if rank == self.party.first:
                tensors += list(self.party.buffers.values())
            if report.finite:
                tensors += payloads[rank]
            self._tell(rank, message(Kind.RESULT, plan.round, 0, tensors))
        self._sent = plan.round if report.finite else -1

    def _give_up(self, plan: Plan, vectors: list[dict[str, Tensor]] | None) -> None:
        """The round is over; say so, and keep what may be kept."""
        self.abandoned += 1
        if vectors is not None:
            self.residuals.keep(plan.round, [task.job for task in plan.tasks], vectors)
        done = int(vectors is not None)
        self._tell(self.party.first, message(Kind.LATE, plan.round, done))

    def _tell(self, rank: int, news: Message) -> None:
        assert self._transport is not None
        try:
            self._transport.isend(rank, news)
        except PeerLost:
            pass  # its next message says why, or that training had ended before

    # Listening.

    def _next_plan(self) -> Plan | None:
        """Take all that has come, in order, and what is to be computed then; None at the end."""
        assert self._inbox is not None
        plan: Plan | None = None
        while True:
            if plan is None:
                self._inbox.wait()
            else:
                self._inbox.look()
            told = self._inbox.pop()
            if told is None:
                return plan
            news = self._take(told)
            if news is None:
                continue
            if news.kind == Kind.STOP:
                return None
            if plan is not None:
                self.skipped += 1
            plan = Plan.unpack(news.sequence, news.tensors)
            self.round = plan.round
            self._save(plan.tag)  # also if this round will be passed over

    def _superseded(self, number: int) -> bool:
        """Whether a newer round than ``number`` has begun, or training has ended."""
        assert self._inbox is not None
        self._inbox.look()
        newer = any(news.sequence > number for news in self._inbox[self.party.first])
        return newer or self._inbox.has_failed

    @torch.no_grad()
    def _take(self, told: Mapping[int, Message]) -> Message | None:
        """One message of each coordinator; the first one's is returned if it is a plan, or the end."""
        news = told[self.party.first]
        kinds = {int(Kind.ROUND): Kind.PART, int(Kind.WHOLE): Kind.WHOLE, int(Kind.STOP): Kind.STOP}
        if news.kind not in kinds:
            raise ProtocolError(self.party.first, news, self.round)
        for rank, theirs in told.items():
            expected = news.kind if rank == self.party.first else kinds[news.kind]
            if theirs.kind != expected or theirs.sequence != news.sequence:
                raise ProtocolError(rank, theirs, news.sequence)
        if news.kind == Kind.WHOLE:
            for rank, names in self.party.parts.items():
                tensors = list(told[rank].tensors)
                if rank == self.party.first:
                    tensors = self._take_buffers(tensors)
                self.ring.load_whole(tensors, names)
            self._computation.weights_changed()
            return None
        self._hear_fate(news.version)
        if news.kind == Kind.STOP:
            self._finish(told)
        else:
            for rank, theirs in told.items():
                start = PLAN_TENSORS if rank == self.party.first else 0
                job, changes = int(theirs.tensors[start]), theirs.tensors[start + 1 :]
                if job >= 0:
                    names = self.party.parts[rank]
                    self.ring.begin(job, changes or None, names, news.sequence)
                    self._computation.weights_changed()
        return news

    def _hear_fate(self, accepted: int) -> None:
        """``accepted`` is the last round that this worker was in time for."""
        if self._sent < 0:
            return
        in_time = accepted == self._sent
        self.in_time += in_time
        self.dropped += not in_time
        self.residuals.settle(in_time)
        self._sent = -1

    def _take_buffers(self, tensors: list[Tensor]) -> list[Tensor]:
        """The rest of the tensors, without the buffers at their end."""
        count = len(self.party.buffers)
        for b, x in zip(self.party.buffers.values(), tensors[len(tensors) - count :], strict=True):
            b.copy_(x)
        return tensors[: len(tensors) - count]

    def _finish(self, told: Mapping[int, Message]) -> None:
        """The final weights of model 0, into the module."""
        for rank, theirs in told.items():
            tensors = list(theirs.tensors)
            if rank == self.party.first:
                tensors = self._take_buffers(tensors)
            for name, x in zip(self.party.parts[rank], tensors, strict=False):
                self.party.parameters[name].copy_(x)
        self._running = False

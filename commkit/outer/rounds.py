"""The way of a unit through a round: taken, reduced beside training, applied; made anew if ranks are lost on the way."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..membership import Elastic
from ..metrics import profiler_range
from ..reducer import Reducer
from ..runtime.alarm import RankFailure
from ..runtime.worker import ReductionWorker
from ..types import Comm
from .anchors import Anchors
from .buffers import BufferAverage
from .options import SyncOptions
from .replica import Replica
from .step_costs import StepCosts
from .transfer import Settle, Transfer
from .units import Unit

T = TypeVar("T")


class RoundAborted(RuntimeError):
    """A round failed on some rank and was undone on all. Committed rounds, anchors and residuals are whole:
    call :meth:`OuterSync.rebuild` with a group of the ranks that are left, or start again from a checkpoint."""


class Rounds:
    """How rounds go, of the ranks that :class:`~commkit.outer.OuterSync` has joined, at the steps that it finds due.

    Args:
        replica: the live model.
        reducer: how pseudo-gradients travel.
        options: what all methods share.
    """

    anchored = True
    _private_comm: Comm  # on the worker's thread
    _round_comm: Comm  # the part of it that a round joins

    def __init__(self, replica: Replica, reducer: Reducer, options: SyncOptions) -> None:
        self.replica = replica
        self.reducer = reducer
        self.options = options
        self.step = self.round = self.skipped_rounds = 0
        self.was_reset = False
        self.weight = 1.0
        self.members: Elastic | None = None
        self.newcomer = False
        self.at_unit: int | None = None  # whose round is under way
        self.late = False  # that round is made anew where its outcome was to be used
        self.merging = False  # all ranks make a mean together, between rounds
        self.units = self.make_units()
        self._anchors: Anchors | None = None
        self._in_flight: deque[Transfer] = deque()
        self._worker: ReductionWorker | None = None
        self._shards: Comm | None = None
        self._begun: dict[int, int] = {}  # by unit: the step after which its last round began
        self._costs = StepCosts()

    # What a method defines.

    def make_units(self) -> list[Unit]:
        """The parts that are synchronised together; the whole model if not overridden."""
        return [Unit(0, tuple(self.replica.parameters), tuple(self.replica.buffers))]

    def delay(self, unit: Unit) -> int:
        """Inner steps between a unit's snapshot and the use of its outcome; 0 waits for it."""
        return 0

    def snapshot(self, unit: Unit) -> dict[str, Tensor]:
        """What is sent of ``unit``: fresh tensors in full precision, by parameter name."""
        return {name: self.anchors.difference(name) for name in unit.parameters}

    @abstractmethod
    def apply(self, unit: Unit, mean: dict[str, Tensor]) -> None:
        """The outer step: bring anchors and weights of ``unit`` up to date with what arrived."""

    @property
    def anchors(self) -> Anchors:
        """
        Raises:
            RuntimeError: not started, or a method without anchors.
        """
        if self._anchors is None:
            raise RuntimeError(
                f"{type(self).__name__} has no anchors (yet); use it in a with block"
            )
        return self._anchors

    def is_open(self, unit: Unit) -> bool:
        """Whether steps were taken since the last round of ``unit`` began."""
        return self.step > self._begun.get(unit.index, self.options.warmup_steps)

    # Rounds, as long as it takes.

    def receive(self) -> None:
        """End the oldest round in flight. If ranks were lost meanwhile, those that are left make it anew, of the weights
        that they have by now."""
        transfer = self._in_flight[0]
        try:
            self.perform_sync()
        except RoundAborted as error:
            self.survive(error)
            self.round = transfer.number
            self.make_round(transfer.unit, late=True)

    def make_round(self, unit: Unit, late: bool = False) -> None:
        """Begin a round of ``unit``, and end it too unless its outcome is for later. If ranks are lost, those that are
        left begin it anew. ``late``: its outcome is used at once in any case."""
        begun, number = dict(self._begun), self.round

        def attempt() -> None:
            self._begun, self.round = dict(begun), number
            if self.members is not None:
                self.at_unit, self.late = unit.index, late
                self.members.catch_up()
            self.prepare_sync(unit)
            if late or self.delay(unit) == 0:
                self.perform_sync()

        self.with_survivors(attempt)
        self.newcomer, self.at_unit, self.late = False, None, False

    def with_survivors(self, attempt: Callable[[], T]) -> T:
        """What ``attempt`` returns. If ranks were lost in it, those that are left make it anew."""
        while True:
            try:
                return attempt()
            except RoundAborted as error:
                self.survive(error)

    def survive(self, error: RoundAborted) -> None:
        """Raise ``error``, unless it came of a loss that the others survive together with this rank."""
        if self.members is None or not self.members.survive(error):
            raise error

    # One attempt at a round.

    def prepare_sync(self, unit: Unit | None = None) -> None:
        """Begin a round of ``unit`` (the only one if not given): take the snapshot and start to reduce it."""
        unit = self.units[0] if unit is None else unit
        with profiler_range("prepare_sync"):
            transfer = self._taken(unit)
        self.round += 1
        self._begun[unit.index] = self.step
        self._submit(transfer)
        self._in_flight.append(transfer)

    def _taken(self, unit: Unit) -> Transfer:
        """The snapshot of a round that begins now."""
        average = self.options.average_buffers and unit.buffers
        return Transfer(
            unit,
            self.round,
            self.step + self.delay(unit),
            self.snapshot(unit),
            0.0 if self.newcomer else self.weight,
            BufferAverage({n: self.replica.buffers[n] for n in unit.buffers}) if average else None,
            [x.to(torch.float32, copy=True) for x in self.replica.inner_state(unit.parameters)]
            if self.options.inner_state == "average"
            else [],
        )

    def perform_sync(self) -> None:
        """End the oldest round that is in flight: wait for it, step the outer optimizer, write back.

        Raises:
            RoundAborted: it failed, here or on another rank.
            FloatingPointError: no replica is finite and the method has nothing to return to.
        """
        with profiler_range("perform_sync"):
            transfer = self._in_flight.popleft()
            with profiler_range("wait"):
                self._wait(transfer)
            self.was_reset = not transfer.finite
            if transfer.skipped:
                self.skipped_rounds += 1
                self.roll_back(transfer.unit)
            else:
                with profiler_range("apply"):
                    self.apply(transfer.unit, transfer.values)
                    if transfer.buffers is not None:
                        transfer.buffers.write()
            self._renew_inner_state(transfer)

    def roll_back(self, unit: Unit) -> None:
        """Return to the last synchronised weights."""
        if self._anchors is None:
            raise FloatingPointError(
                f"no replica has finite weights, and {type(self).__name__} keeps none to return to; give it a "
                "reducer, which brings anchors, or lower the learning rate"
            )
        self._anchors.write_back(unit.parameters)

    @torch.no_grad()
    def restart_from_anchors(self) -> None:
        """Give up local progress: for replicas that resume without weights of their own, as in a job of another
        size."""
        for unit in self.units:
            self.roll_back(unit)

    def _renew_inner_state(self, transfer: Transfer) -> None:
        if not transfer.finite:
            self.replica.reset_inner_state()
        elif self.options.inner_state == "reset":
            self.replica.reset_inner_state(transfer.unit.parameters)
        elif transfer.extras and not transfer.skipped:
            live = self.replica.inner_state(transfer.unit.parameters)
            for state, mean in zip(live, transfer.extras, strict=True):
                state.copy_(mean)

    # The worker's thread, which alone uses its group; and waiting for it.

    def carry_out(self, transfer: Transfer, comm: Comm) -> None:
        """The communication of one round, on the worker's thread."""
        transfer.carry_out(self.reducer, comm, self._shards, self.settle)

    @property
    def settle(self) -> Settle | None:
        """Makes a round's outcome count if all ranks have it, where ranks may be lost."""
        return None if self.members is None else self.members.settle_round

    def settle_outcome(self) -> None:
        """After :meth:`carry_out`, on the worker's thread; a reducer's state is settled in there."""

    def in_background(
        self, job: Callable[[], None], uses: Sequence[Tensor] = ()
    ) -> torch.futures.Future[Tensor]:
        """Queue ``job`` on the worker's thread; jobs run in the order in which they are queued. ``uses`` are the tensors
        that it reads or writes."""

        def timed() -> None:
            start = time.perf_counter()
            job()
            self._costs.add(time.perf_counter() - start)

        return self._queued(timed, uses)

    def on_worker(self, job: Callable[[], object], uses: Sequence[Tensor] = ()) -> None:
        """Queue ``job`` as :meth:`in_background` does, and wait for it. Its time is not counted as a reduction's.

        Raises:
            RoundAborted: it failed, here or on another rank.
        """
        self._finished(self._queued(job, uses))

    def _queued(
        self, job: Callable[[], object], uses: Sequence[Tensor]
    ) -> torch.futures.Future[Tensor]:
        assert self._worker is not None
        done = torch.zeros(1, device=self.replica.device)

        def run() -> Tensor:
            with torch.no_grad():
                job()
            return done

        return self._worker.submit(run, done, uses)

    def _submit(self, transfer: Transfer) -> None:
        def carry_out() -> None:
            with profiler_range("carry_out"):
                self.carry_out(transfer, self._round_comm)
                self.settle_outcome()
            self._costs.end_transfer(transfer.stats)

        transfer.future = self.in_background(carry_out, transfer.tensors)

    def _wait(self, transfer: Transfer) -> None:
        if transfer.future is None:
            return
        self._finished(transfer.future)
        transfer.future = None
        if self.replica.device.type == "cuda":
            # They are of the worker's stream, which may already be at the next round when they are freed.
            stream = torch.cuda.current_stream(self.replica.device)
            for x in transfer.tensors:
                x.record_stream(stream)

    def _finished(self, future: torch.futures.Future[Tensor]) -> None:
        assert self._worker is not None
        try:
            future.wait()
        except RuntimeError:  # torch's rendering of the worker's failure
            if self._worker.failure is None:
                raise
            self._abort(self._worker.failure)

    def _abort(self, failure: RankFailure) -> None:
        self._in_flight.clear()
        if self.members is not None:  # the round is made anew
            self.reducer.abandon()
            raise RoundAborted(f"round {self.round - 1} failed: {failure}") from failure
        self.reducer.end_step(keep=False)
        self._begun.clear()
        if self.options.on_abort == "rollback" and self._anchors is not None:
            self.restart_from_anchors()
        raise RoundAborted(
            f"round {self.round - 1} was aborted ({failure}); on_abort={self.options.on_abort!r}. Call "
            "rebuild(process_group) with the ranks that are left, or resume from a checkpoint"
        ) from failure

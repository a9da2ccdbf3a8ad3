"""The shape that all methods with local updates share: a context manager around an ordinary loop."""

from __future__ import annotations

import dataclasses
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from ..aggregators import AllReduce
from ..comm import DistComm, new_group_like, require_group
from ..compressors import NoCompression
from ..membership import Elastic
from ..metrics import StepStats, profiler_range
from ..reducer import Reducer, all_reduce_dense
from ..registry import spec
from ..runtime.agreement import (
    agree,
    mark_attached,
    refuse_attached,
    unmark_attached,
    wrapped_in_ddp,
)
from ..runtime.alarm import Alarm, NoAlarm, RankFailure
from ..runtime.meter import StepMeter
from ..runtime.redealing import dealt_again
from ..runtime.shards import local
from ..runtime.wire_checksums import CheckedComm
from ..runtime.worker import ReductionWorker
from ..types import SHARED, Comm
from .anchors import Anchors, OuterOptimizer
from .buffers import BufferAverage
from .options import SyncOptions
from .replica import Replica
from .transfer import Settle, Transfer
from .units import Unit

T = TypeVar("T")

Ranks: TypeAlias = "dist.ProcessGroup | Comm | None"

_started = 0


class RoundAborted(RuntimeError):
    """A round failed on some rank and was undone on all. Committed rounds, anchors and residuals are whole:
    call :meth:`OuterSync.rebuild` with a group of the ranks that are left, or start again from a checkpoint."""


class OuterSync:
    """Replicas train alone and meet every so often.

    Between ``with`` and its end each call of ``optimizer.step()`` counts as one inner step; when a unit of
    the model is due, its pseudo-gradient (anchor minus weight) is reduced over the ranks on a thread and
    process group of its own, the outer optimizer steps on the anchor, and the weights follow. The loop does not
    change. The model must not be in a DistributedDataParallel that spans replicas.

    All ranks start with rank 0's weights and buffers. A replica whose weights are not finite is left out
    of the round, takes what the others agree on, and its inner optimizer starts anew.

    Args:
        model: a module; one in a DDP of this replica's own ranks; or one that FSDP2's ``fully_shard`` has
            sharded over this replica's own ranks. ``process_group`` then joins ranks of different replicas (the
            same shard of each).
        optimizer: the inner one; any.
        sync_every: inner steps per round, H >= 1.
        reducer: how pseudo-gradients travel; None sends them densely. Every compressor works here.
        outer_optimizer: builds the outer optimizer over the anchors; None for methods without one.
        options: what all methods share.
        process_group: the ranks that synchronise; None is the default group. For simulations, a Comm.
        master_weights: full-precision copies by parameter name, if the inner optimizer keeps such.

    Attributes:
        step: inner steps behind us, warm-up included.
        round: rounds begun (a fragment or layer counts as one).
        skipped_rounds: rounds in which no replica was finite.
        was_reset: this replica was left out of its last round.
        weight: of this replica's next contributions, such as its number of tokens; 1 by default.
        comm: collectives for the training thread.
        reducer: the scheme at work.
        members: set before it starts: ranks may be lost and joined by others.
        wire_checksums: set before it starts: payloads carry checksums; see :class:`~commkit.Debug`.
        newcomer: this replica has joined the others since their last round, so it has nothing to contribute to the
            next.

    Raises:
        ValueError: ``sync_every`` below 1, or what :class:`Replica` refuses.
    """

    anchored = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sync_every: int,
        reducer: Reducer | None = None,
        outer_optimizer: OuterOptimizer | None = None,
        options: SyncOptions | None = None,
        process_group: Ranks = None,
        master_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        if sync_every < 1:
            raise ValueError(
                f"sync_every={sync_every} must be >= 1; use 1 to synchronise after every step"
            )
        self.model = model
        self.optimizer = optimizer
        self.sync_every = sync_every
        self.reducer = Reducer(AllReduce(NoCompression())) if reducer is None else reducer
        self.options = SyncOptions() if options is None else options
        self.replica = Replica(model, optimizer, master_weights)
        self.step = self.round = self.skipped_rounds = 0
        self.was_reset = False
        self.weight = 1.0
        self.members: Elastic | None = None
        self.wire_checksums = False
        self.newcomer = False
        self.at_unit: int | None = None  # whose round is under way
        self.late = False  # that round is made anew where its outcome was to be used
        self.merging = False  # all ranks make a mean together, between rounds
        self.units = self.make_units()
        self._group = process_group
        self._make_outer = outer_optimizer
        self._anchors: Anchors | None = None
        self._in_flight: deque[Transfer] = deque()
        self._worker: ReductionWorker | None = None
        self._shards: Comm | None = None
        self._hooks: list[Any] = []
        self._begun: dict[int, int] = {}  # by unit: the step after which its last round began
        self._last_step = StepStats()
        self._stats: deque[StepStats] = deque()

    # What a method defines.

    def make_units(self) -> list[Unit]:
        """The parts that are synchronised together; the whole model if not overridden."""
        return [Unit(0, tuple(self.replica.parameters), tuple(self.replica.buffers))]

    def due(self) -> list[Unit]:
        """The units whose round ends after the inner step just done; asked once per step, the same on every rank."""
        return [] if self.local_steps % self.sync_every else self.units

    def delay(self, unit: Unit) -> int:
        """Inner steps between a unit's snapshot and the use of its outcome; 0 waits for it."""
        return 0

    def snapshot(self, unit: Unit) -> dict[str, Tensor]:
        """What is sent of ``unit``: fresh tensors in full precision, by parameter name."""
        return {name: self.anchors.difference(name) for name in unit.parameters}

    @abstractmethod
    def apply(self, unit: Unit, mean: dict[str, Tensor]) -> None:
        """The outer step: bring anchors and weights of ``unit`` up to date with what arrived."""

    def round_comm(self, private: Comm) -> Comm:
        """The ranks that one round joins: all of ``private``, or a part of it. Collective over it."""
        return private

    def refusal(self, world_size: int) -> str:
        """Why the method cannot work with so many ranks; empty if it can. A function of the settings alone."""
        return ""

    def settings(self) -> dict[str, Any]:
        """What else must be equal on all ranks, as plain data."""
        return {}

    def position(self) -> dict[str, int]:
        """What of the progress must be equal on all ranks."""
        return {"step": self.step, "round": self.round}

    @property
    def mid_round(self) -> bool:
        """Whether a round is about to be made, of which a rank that joins now has nothing to tell."""
        return self.at_unit is not None

    @property
    def common_anchors(self) -> bool:
        """Whether anchors are the same on all ranks."""
        return True

    # What a user touches.

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

    @property
    def local_steps(self) -> int:
        """Inner steps since the warm-up."""
        return max(0, self.step - self.options.warmup_steps)

    @property
    def started(self) -> bool:
        return self._worker is not None

    @property
    def last_step(self) -> StepStats:
        """What the last inner step cost; transfers count in the step in which they end."""
        return self._last_step

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(finish=error is None)

    def start(self) -> Self:
        """Join the other ranks, take rank 0's weights, and count steps from now on. Collective.

        Raises:
            RuntimeError: attached before, ranks disagree (the differing field is named), or a DDP spans
                replicas.
        """
        comm, private, alarm = self._join(self._group)
        agree(comm, *self._fingerprint())
        self.comm = comm
        if self.members is None:  # which gives weights to those who have none
            with torch.no_grad():
                self.replica.follow(private, src=0)
        if self.anchored:
            self._anchors = Anchors(self.replica, self._make_outer, self.options.offload)
            agree(comm, {"outer optimizer": self._anchors.optimizer_settings()}, None)
        self._open(private, alarm)
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._on_step),
            self.optimizer.register_step_post_hook(lambda *_: self.after_step()),
        ]
        mark_attached(self.model)
        return self

    def close(self, finish: bool = True) -> None:
        """Stop counting steps. With ``finish``, apply what is in flight and, if the options say so, close the
        open round: collective then."""
        if self._worker is None:
            return
        for hook in self._hooks:
            hook.remove()
        unmark_attached(self.model)
        try:
            if finish and self._worker.failure is None:
                self.finish()
        finally:
            self._worker.close()
            self._worker = None

    @torch.no_grad()
    def finish(self) -> None:
        """Apply what is in flight and, if the options say so, synchronise once more. Collective."""
        while self._in_flight:
            self.receive()
        if self.options.final_sync:
            for unit in filter(self.is_open, self.units):
                self.make_round(unit)
                while self._in_flight:
                    self.receive()

    def is_open(self, unit: Unit) -> bool:
        """Whether steps were taken since the last round of ``unit`` began."""
        return self.step > self._begun.get(unit.index, self.options.warmup_steps)

    @torch.no_grad()
    def after_step(self) -> None:
        """Count one inner step and do what is due. ``optimizer.step()`` calls it; call it yourself for steps that
        the optimizer does not see, such as those a GradScaler skips on one rank only.

        Raises:
            RoundAborted: a round failed, here or on another rank.
        """
        start = time.perf_counter()
        self.step += 1
        if self.step == self.options.warmup_steps and self._anchors is not None:
            self._anchors.read()
        if self.step > self.options.warmup_steps:
            self.synchronise()
        self._record(time.perf_counter() - start)

    def synchronise(self) -> None:
        """What is due after an inner step: first outcomes whose time has come, then new rounds, so that no
        snapshot holds half an update."""
        while self._in_flight and self._in_flight[0].apply_at <= self.step:
            self.receive()
        for unit in self.due():
            self.make_round(unit)

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
        while True:
            begun, number = dict(self._begun), self.round
            try:
                if self.members is not None:
                    self.at_unit, self.late = unit.index, late
                    self.members.catch_up()
                self.prepare_sync(unit)
                if late or self.delay(unit) == 0:
                    self.perform_sync()
            except RoundAborted as error:
                self.survive(error)
                self._begun, self.round = begun, number
            else:
                self.newcomer, self.at_unit, self.late = False, None, False
                return

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
    def rebuild(self, process_group: Ranks) -> None:
        """Go on with other ranks after an aborted round: the survivors, in the same order. Collective over the
        new group; nothing is lost, since pseudo-gradients are measured from the anchors.

        Raises:
            RuntimeError: ranks disagree on configuration, step or anchors.
        """
        if self._worker is not None:
            self._worker.close()
        comm, private, alarm = self._join(process_group)
        agree(comm, *self._fingerprint())
        if self.members is not None:
            if self._anchors is not None:  # as ranks do that start now
                agree(comm, {"outer optimizer": self._anchors.optimizer_settings()}, None)
        elif self._anchors is not None and self.common_anchors:
            # A rank may have applied a round that the others have not, if the failure came between.
            agree(comm, {"anchors": self._anchors.digests()}, None)
        self._group, self.comm = process_group, comm
        self._open(private, alarm)

    def state_dict(self) -> dict[str, Any]:
        """What is equal on all ranks: anchors, outer optimizer, position, and rounds in flight, which are waited
        for. Weights and the inner optimizer differ between ranks inside a round: save them per rank, and
        ``reducer`` as such, after this call: until then a transfer may be at work on it."""
        for transfer in self._in_flight:
            self._wait(transfer)
        return self._settled([transfer.state_dict() for transfer in self._in_flight])

    def _settled(self, in_flight: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "step": self.step,
            "round": self.round,
            "skipped_rounds": self.skipped_rounds,
            "begun": dict(self._begun),
            "anchors": None if self._anchors is None else self._anchors.state_dict(),
            "in_flight": in_flight,
        }

    def kept_tensors(self) -> list[Tensor]:
        """What is kept between rounds on this rank besides weights and the inner optimizer's state: all of
        :meth:`state_dict`, what is in flight included, and the reducer's residuals."""
        residuals = {k: v for k, v in self.reducer.state_dict().items() if not k.startswith(SHARED)}
        own = _tensors([self.state_dict(), self.rank_state_dict()])
        unique = {x.data_ptr(): x for x in own}  # common and this rank's may overlap
        for x in (*self.replica.parameters.values(), *self.replica.buffers.values()):
            unique.pop(x.data_ptr(), None)
        return [*unique.values(), *residuals.values()]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.round = state["step"], state["round"]
        self.skipped_rounds = state["skipped_rounds"]
        self._begun = dict(state["begun"])
        if self._anchors is not None:
            self._anchors.load_state_dict(state["anchors"])
        self._in_flight = deque(
            Transfer.of_state(
                one, self.units[one["unit"]], self.replica.buffers, self._round_comm.rank
            )
            for one in state["in_flight"]
        )

    @property
    def replica_state(self) -> ReplicaState:
        """What this rank alone has of the method, besides weights and the inner optimizer: give it to
        ``commkit.checkpoint`` as a ``per_rank`` item."""
        return ReplicaState(self)

    def rank_state_dict(self) -> dict[str, Any]:
        """See :attr:`replica_state`. Waits for what is in flight."""
        return {}

    def load_rank_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`rank_state_dict` gave, after :meth:`load_state_dict`."""

    def after_resize(self) -> None:
        """The state was saved by another number of ranks: local progress is gone.

        Raises:
            RuntimeError: a method that keeps no anchors to restart from.
        """
        if not self.anchored:
            raise RuntimeError(
                f"{type(self).__name__} keeps no anchors, so inside a round its state means nothing to another "
                "number of ranks; resume with as many as saved it, or give it a reducer, which brings anchors"
            )
        self.restart_from_anchors()

    @torch.no_grad()
    def restart_from_anchors(self) -> None:
        """Give up local progress: for replicas that resume without weights of their own, as in a job of another
        size."""
        for unit in self.units:
            self.roll_back(unit)

    # How it is done.

    def _join(self, group: Ranks) -> tuple[Comm, Comm, Alarm | NoAlarm]:
        """Collectives for the training thread, collectives for the worker, and how failures travel."""
        global _started
        if group is not None and not isinstance(group, dist.ProcessGroup):
            everybody = [list(range(group.world_size))]
            return group, group.split(everybody, "outer"), NoAlarm()
        _started += 1
        group = require_group(group)
        timeout_s = self.options.timeout_s
        private: Comm = DistComm(new_group_like(group, timeout_s), timeout_s)
        if self.wire_checksums:
            private = CheckedComm(private)
        if self.members is not None:  # who tell of failures
            return DistComm(group), private, NoAlarm()
        shards = self.replica.shard_group
        if shards is None:
            return DistComm(group), private, Alarm(group, f"outer{_started}")
        if self._shards is None:
            self._shards = DistComm(new_group_like(shards, timeout_s), timeout_s)
        # A failure that one shard's group sees concerns them all.
        return DistComm(group), private, Alarm(require_group(None), f"outer{_started}")

    def _fingerprint(self) -> tuple[dict[str, Any], Exception | None]:
        try:
            if self._worker is None:
                refuse_attached(self.model)
            self._refuse_spanning_ddp()
            return {
                "method": type(self).__name__,
                "sync_every": self.sync_every,
                **self.settings(),
                "options": spec(dataclasses.replace(self.options, offload=False)),
                "reducer": self.reducer_spec(),
                **self.replica.fingerprint(),
                # Who joins is given the others' position.
                **(self.position() if self.members is None else {}),
            }, None
        except Exception as error:
            return {}, error

    def reducer_spec(self) -> dict[str, Any]:
        """What of the reducer must be equal on all ranks, as plain data."""
        return self.reducer.spec()

    def _refuse_spanning_ddp(self) -> None:
        if not (self._group is None or isinstance(self._group, dist.ProcessGroup)):
            return
        ours = set(dist.get_process_group_ranks(require_group(self._group)))
        shards = self.replica.shard_group
        if shards is not None and len(ours & set(dist.get_process_group_ranks(shards))) > 1:
            raise RuntimeError(
                f"process_group holds ranks {sorted(ours)}, several of which hold different shards of one replica; "
                f'give {type(self).__name__} ranks of the same shard: mesh["replicate"].get_group()'
            )
        ddp = wrapped_in_ddp(self.replica.parameters.values())
        if ddp is None:
            return
        theirs = set(dist.get_process_group_ranks(ddp.process_group))
        if len(ours & theirs) > 1:
            raise RuntimeError(
                f"a DistributedDataParallel around this model averages gradients over ranks {sorted(theirs)} at "
                f"every step, which are to train alone; give {type(self).__name__} the plain module"
            )

    def _open(self, private: Comm, alarm: Alarm | NoAlarm) -> None:
        self._private_comm = private
        self._meter = StepMeter(private)
        like = {name: self.snapshot_like(name) for name in self.replica.parameters}
        self._round_comm = self.round_comm(private)
        if self.members is not None:
            dealt_again(self.reducer, self.replica.parameters, private)
        self.reducer.prepare(like, self._round_comm)
        self._worker = self.make_worker(alarm)

    def make_worker(self, alarm: Alarm | NoAlarm) -> ReductionWorker:
        """What carries rounds out beside training."""
        return ReductionWorker(alarm, self.options.timeout_s, self.replica.device)

    def snapshot_like(self, name: str) -> Tensor:
        """An empty tensor like what is sent of parameter ``name``."""
        x = self.replica.live(name)
        return x.new_empty(
            x.shape,
            dtype=torch.promote_types(self.replica.parameters[name].dtype, torch.float32),
        )

    def _submit(self, transfer: Transfer) -> None:
        def carry_out() -> None:
            with profiler_range("carry_out"):
                self.carry_out(transfer, self._round_comm)
                self.settle_outcome()
            self._stats.append(transfer.stats)

        transfer.future = self.in_background(carry_out, transfer.tensors)

    def in_background(
        self, job: Callable[[], None], uses: Sequence[Tensor] = ()
    ) -> torch.futures.Future[Tensor]:
        """Queue ``job`` on the worker's thread, which alone uses its group; jobs run in the order in which they are
        queued. ``uses`` are the tensors that it reads or writes."""
        assert self._worker is not None
        done = torch.zeros(1, device=self.replica.device)

        def run() -> Tensor:
            start = time.perf_counter()
            with torch.no_grad():
                job()
            self._meter.add(time.perf_counter() - start)
            return done

        return self._worker.submit(run, done, uses)

    def carry_out(self, transfer: Transfer, comm: Comm) -> None:
        """The communication of one round, on the worker's thread."""
        transfer.carry_out(self.reducer, comm, self._shards, self.settle)

    @property
    def settle(self) -> Settle | None:
        """Makes a round's outcome count if all ranks have it, where ranks may be lost."""
        return None if self.members is None else self.members.settle_round

    def settle_outcome(self) -> None:
        """After :meth:`carry_out`, on the worker's thread; a reducer's state is settled in there."""

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

    def _renew_inner_state(self, transfer: Transfer) -> None:
        if not transfer.finite:
            self.replica.reset_inner_state()
        elif self.options.inner_state == "reset":
            self.replica.reset_inner_state(transfer.unit.parameters)
        elif transfer.extras and not transfer.skipped:
            live = self.replica.inner_state(transfer.unit.parameters)
            for state, mean in zip(live, transfer.extras, strict=True):
                state.copy_(mean)

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Gradients are ready when the optimizer steps; if it is given a closure, when that has run."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._before_step(optimizer, args, kwargs)
            return None
        calls = 0

        def ready() -> Any:
            nonlocal calls
            loss = self.evaluate(closure)
            calls += 1
            if calls == 1:
                self._before_step(optimizer, args, kwargs)
            else:  # LBFGS evaluates several times in a step
                OuterSync._before_step(self, optimizer, args, kwargs)
            return loss

        return args[:1], {**kwargs, "closure": ready}

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        """Run the closure that ``optimizer.step(closure)`` was given, which leaves gradients; returns its loss."""
        return closure()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """In the warm-up, average the gradients as DDP does."""
        if self.step >= self.options.warmup_steps:
            return
        with torch.no_grad():
            gradients = {}
            for name, p in self.replica.parameters.items():
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                gradients[name] = local(p.grad)
            done = torch.zeros(1, device=self.replica.device)

            def average() -> Tensor:
                with torch.no_grad():
                    means = all_reduce_dense(gradients, self._private_comm)
                    for name, mean in means.items():
                        gradients[name].copy_(mean)
                return done

            assert self._worker is not None
            self._finished(self._worker.submit(average, done, list(gradients.values())))

    def _finished(self, future: torch.futures.Future[Tensor]) -> None:
        assert self._worker is not None
        try:
            future.wait()
        except RuntimeError:  # torch's rendering of the worker's failure
            if self._worker.failure is None:
                raise
            self._abort(self._worker.failure)

    def _record(self, exposed: float) -> None:
        # Transfers may end meanwhile, on the worker's thread.
        stats = [self._stats.popleft() for _ in range(len(self._stats))]
        last = stats[-1] if stats else self._last_step
        ended = StepStats(
            step=self.step - 1,
            dense_bytes=sum(s.dense_bytes for s in stats),
            num_contributors=min((s.num_contributors for s in stats), default=0),
            nonfinite=any(s.nonfinite for s in stats),
            residual_norm=last.residual_norm,
        )
        self._last_step = self._meter.close(ended, exposed)


class ReplicaState:
    """What one replica alone has, as :mod:`commkit.checkpoint` wants it."""

    def __init__(self, method: OuterSync) -> None:
        self._method = method

    def state_dict(self) -> dict[str, Any]:
        return self._method.rank_state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._method.load_rank_state_dict(state_dict)


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        if state.dim():
            yield state
    elif isinstance(state, Mapping | list | tuple):
        for value in state.values() if isinstance(state, Mapping) else state:
            yield from _tensors(value)

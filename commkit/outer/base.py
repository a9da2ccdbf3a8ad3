"""The shape that all methods with local updates share: a context manager around an ordinary loop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from ..aggregators import AllReduce
from ..compressors import NoCompression
from ..metrics import StepStats
from ..reducer import Reducer
from ..registry import spec
from ..runtime.agreement import agree, mark_attached, refuse_attached, unmark_attached
from ..runtime.alarm import Alarm, NoAlarm
from ..runtime.redealing import dealt_again
from ..runtime.worker import ReductionWorker
from ..types import Comm
from .anchors import Anchors, OuterOptimizer
from .inner_steps import average_gradients, when_ready
from .joining import Joined, Ranks, join, refuse_spanning
from .options import SyncOptions
from .replica import Replica
from .resumable import ResumableRounds
from .units import Unit


class OuterSync(ResumableRounds):
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
        super().__init__(
            Replica(model, optimizer, master_weights),
            Reducer(AllReduce(NoCompression())) if reducer is None else reducer,
            SyncOptions() if options is None else options,
        )
        self.wire_checksums = False
        self._group = process_group
        self._make_outer = outer_optimizer
        self._hooks: list[Any] = []

    # What a method defines.

    def due(self) -> list[Unit]:
        """The units whose round ends after the inner step just done; asked once per step, the same on every rank."""
        return [] if self.local_steps % self.sync_every else self.units

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
    def local_steps(self) -> int:
        """Inner steps since the warm-up."""
        return max(0, self.step - self.options.warmup_steps)

    @property
    def started(self) -> bool:
        return self._worker is not None

    @property
    def last_step(self) -> StepStats:
        """What the last inner step cost; transfers count in the step in which they end."""
        return self._costs.last

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
        joined = self._join(self._group)
        comm, self._shards = joined.comm, joined.shards
        agree(comm, *self._fingerprint())
        self.comm = comm
        if self.members is None:  # which gives weights to those who have none
            with torch.no_grad():
                self.replica.follow(joined.private, src=0)
        if self.anchored:
            self._anchors = Anchors(self.replica, self._make_outer, self.options.offload)
            agree(comm, {"outer optimizer": self._anchors.optimizer_settings()}, None)
        self._open(joined.private, joined.alarm)
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
            # A loss that came after the last step is survived in there.
            if finish and (self._worker.failure is None or self.members is not None):
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

    @torch.no_grad()
    def rebuild(self, process_group: Ranks) -> None:
        """Go on with other ranks after an aborted round: the survivors, in the same order. Collective over the
        new group; nothing is lost, since pseudo-gradients are measured from the anchors.

        Raises:
            RuntimeError: ranks disagree on configuration, step or anchors.
        """
        if self._worker is not None:
            self._worker.close()
        joined = self._join(process_group)
        comm, self._shards = joined.comm, joined.shards
        agree(comm, *self._fingerprint())
        if self.members is not None:
            if self._anchors is not None:  # as ranks do that start now
                agree(comm, {"outer optimizer": self._anchors.optimizer_settings()}, None)
        elif self._anchors is not None and self.common_anchors:
            # A rank may have applied a round that the others have not, if the failure came between.
            agree(comm, {"anchors": self._anchors.digests()}, None)
        self._group, self.comm = process_group, comm
        self._open(joined.private, joined.alarm)

    # How it is done.

    def _join(self, group: Ranks) -> Joined:
        return join(
            group,
            self.replica,
            self.options.timeout_s,
            shards=self._shards,
            checksums=self.wire_checksums,
            elastic=self.members is not None,
        )

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
        refuse_spanning(self._group, self.replica, type(self).__name__)

    def _open(self, private: Comm, alarm: Alarm | NoAlarm) -> None:
        self._private_comm = private
        self._costs.measure(private)
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

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Gradients are ready when the optimizer steps; if it is given a closure, when that has run."""
        return when_ready(
            args,
            kwargs,
            self.evaluate,
            lambda: self._before_step(optimizer, args, kwargs),
            self._average_gradients,
        )

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        """Run the closure that ``optimizer.step(closure)`` was given, which leaves gradients; returns its loss."""
        return closure()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._average_gradients()

    def _average_gradients(self) -> None:
        """In the warm-up, average the gradients as DDP does."""
        if self.step < self.options.warmup_steps:
            average_gradients(self.replica, self._private_comm, self.on_worker)

    def _record(self, exposed: float) -> None:
        self._costs.close(self.step - 1, exposed)

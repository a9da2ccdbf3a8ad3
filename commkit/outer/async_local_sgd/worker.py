"""The ranks that train."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from ...aggregators.health import are_finite
from ...metrics import StepStats
from ...runtime.agreement import mark_attached, refuse_attached, unmark_attached, wrapped_in_ddp
from ...runtime.alarm import RankFailure
from ...runtime.session import Session
from ...transport import Message, PeerLost, Pending, TorchTransport, TransportClosed
from ...types import Feedback
from ..anchors import Anchors
from ..replica import Replica
from .options import AsyncOptions
from .protocol import Kind, Party, Report, Task, message


class AsyncWorker(Session):
    """Trains on one shard of the data after another, for a server that does not wait for anybody.

    A context manager around an ordinary loop. Each ``optimizer.step()`` counts; when a task is done, the step pushes how
    far the weights went and returns with newer ones, a shard and a number of steps for the next task. Between tasks
    ``shard`` and ``shard_step`` change, so ask for them at every step: they say which batch comes next, and
    ``shard_step`` is what the learning-rate schedule goes by. See :class:`AsyncServer` for an example.

    State: 4 bytes per parameter for the weights that the task started from, and with a compressor 4 for its
    residual; as much again while a push is made.

    Args:
        model: a module of the same architecture on all ranks, not in DistributedDataParallel; a worker is one
            process.
        optimizer: the inner one; any.
        options: the same on all ranks.
        feedback: what becomes of what the compressor leaves unsent; None is error feedback where it converges. A
            push that the server drops leaves the residual as it was.
        process_group: servers and workers; None is the default group.
        master_weights: full-precision copies by parameter name, if the inner optimizer keeps such.

    Attributes:
        training: false once the server has had enough; the model then holds the final weights.
        shard: of the data to train on now.
        shard_step: steps that this shard has behind it, on any worker.
        task_steps: H, of the present task.
        step: inner steps of this worker.
        dropped: pushes of this worker that the server did not take.
        version: of the weights that the present task started from.
        clock: seconds; what tasks are timed with. Another one for simulations.

    Raises:
        ValueError: this rank is in ``options.servers``, or what :class:`~commkit.outer.replica.Replica` refuses.
        TypeError: a feedback that fits neither compressor nor server.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        options: AsyncOptions | None = None,
        *,
        feedback: Feedback | None = None,
        process_group: dist.ProcessGroup | None = None,
        master_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.options = AsyncOptions() if options is None else options
        self.model = model
        self.optimizer = optimizer
        self.replica = Replica(model, optimizer, master_weights)
        self.party = Party(model, self.options, process_group)
        if self.party.rank in self.options.servers:
            raise ValueError(
                f"rank {self.party.rank} is in servers={self.options.servers}; make an AsyncServer there"
            )
        self.feedback = self.party.codec.feedback(feedback)
        self.training = False
        self.step = self.shard = self.shard_step = self.task_steps = self.dropped = 0
        self.version = 0
        self._done = 0  # steps of the present task
        self._losses: list[float] = []  # of these steps
        self._number = -1  # its lease
        self._pushed = False
        self.clock = time.perf_counter
        self._began = 0.0
        self._anchors: Anchors | None = None
        self._transport: TorchTransport | None = None
        self._pending: dict[int, Pending] = {}
        self._hook: Any = None
        self._before = (0, 0, 0, 0.0)
        self._last_step = StepStats()

    @property
    def last_step(self) -> StepStats:
        """What the last inner step cost. ``exposed_comm_seconds`` is what it waited for the server."""
        return dataclasses.replace(self._last_step, residual_norm=self.feedback.norm())

    def start(self) -> Self:
        """Meet all other ranks, and take the first task. Collective, but for the task.

        Raises:
            RuntimeError: ranks disagree (the differing field is named), the model is attached to something else, or a
                DistributedDataParallel averages its gradients.
            RankFailure: the server failed.
            TimeoutError: it sent nothing for ``options.timeout_s``.
        """
        error: Exception | None = None
        try:
            refuse_attached(self.model)
            self._refuse_ddp()
        except Exception as refusal:
            error = refusal
        self._transport = self.party.join(error, self.options.servers)
        self._anchors = Anchors(self.replica, None, offload=False)
        for rank in self.options.servers:
            self._pending[rank] = self._transport.irecv(rank)
        mark_attached(self.model)
        self._hook = self.optimizer.register_step_post_hook(lambda *_: self.after_step())
        try:
            with torch.no_grad():
                self._take()
        except BaseException as failure:
            self.close(f"{type(failure).__name__}: {failure}")
            raise
        return self

    def close(self, error: str | None = None) -> None:
        """Leave: the server gives what this worker has begun to others. With ``error`` it is told why, and by
        ``options.on_worker_error`` ends the training."""
        if self._transport is None:
            return
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        unmark_attached(self.model)
        self.training = False
        self._transport.close(error)

    def report_loss(self, loss: float) -> None:
        """Tell the loss of the step that comes next, before ``optimizer.step()``: its mean over the task goes to the
        server with the push, for ``on_push`` to log. Optional."""
        self._losses.append(float(loss))

    @torch.no_grad()
    def after_step(self) -> None:
        """Count one inner step, and push when the task is done. ``optimizer.step()`` calls it; call it yourself for steps
        that the optimizer does not see, such as those a GradScaler skips.

        Raises:
            RankFailure: a server failed, or another worker made it fail.
            TimeoutError: no answer for ``options.timeout_s``.
            RuntimeError: a step after the end of training.
        """
        if not self.training:
            raise RuntimeError(
                "the server has ended the training; leave the loop when worker.training is false"
            )
        start = time.perf_counter()
        self.step += 1
        self.shard_step += 1
        self._done += 1
        if self._done == self.task_steps:
            self._push()
            self._take()
        elif any(pending.done for pending in self._pending.values()):
            self._take()  # the end of training, or of a server
        self._record(time.perf_counter() - start)

    def state_dict(self) -> dict[str, Any]:
        """What the compressor has left unsent on this rank. The inner optimizer is the user's to save; the task in
        hand is not saved."""
        return {"feedback": self.feedback.state_dict(), "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.feedback.load_state_dict(state["feedback"])
        self.step = state["step"]

    # How it is done.

    def _refuse_ddp(self) -> None:
        ddp = wrapped_in_ddp(self.replica.parameters.values())
        if ddp is not None and dist.get_world_size(ddp.process_group) > 1:
            raise RuntimeError(
                "a DistributedDataParallel around this model averages gradients over several ranks, but a worker is "
                "one process; give AsyncWorker a plain module"
            )

    def _push(self) -> None:
        """Send to each server its part of how far this task went."""
        assert self._anchors is not None
        if self.replica.device.type == "cuda":
            torch.cuda.synchronize(self.replica.device)
        seconds = self.clock() - self._began
        delta = {name: self._anchors.difference(name) for name in self.replica.parameters}
        buffers = list(self.party.buffers.values())
        payloads: dict[int, list[Tensor]] = {}
        finite = are_finite([*delta.values(), *buffers])
        if finite:
            for rank, names in self.party.parts.items():
                payloads[rank] = self.party.codec.encode(
                    delta, names, self._number, self.party.rank, self.feedback
                )
            # What overflowed in the code must not reach some servers and be dropped by others.
            finite = are_finite(x for payload in payloads.values() for x in payload)
        loss = sum(self._losses) / len(self._losses) if self._losses else math.nan
        report = Report(self._done, seconds, finite, loss).pack()
        for rank in self.options.servers:
            tensors = [report]
            if finite:
                tensors += [*(buffers if rank == self.party.first else []), *payloads[rank]]
            self._send(rank, message(Kind.PUSH, self._number, self.version, tensors))
        self._pushed = True
        if not finite:
            self.replica.reset_inner_state()  # its moments are poisoned, too

    def _take(self) -> None:
        """Wait for weights and a task, from all servers."""
        told = self._next_of_all()
        first = told[self.party.first]
        task = Task.unpack(first.tensors[0])
        if any((m.sequence, m.version) != (first.sequence, first.version) for m in told.values()):
            raise RuntimeError(
                "servers sent weights of different versions; resume all of them from checkpoints of the same push"
            )
        if self._pushed:
            accepted = task.accepted == self._number
            self.feedback.commit(accepted)
            self.dropped += not accepted
            self._pushed = False
        self._load(told)
        self.training = not task.stop
        self._number, self.version, self._done = first.sequence, first.version, 0
        self._losses.clear()
        self.shard, self.shard_step, self.task_steps = task.shard, task.first_step, task.steps
        if self.options.inner_state == "reset":
            self.replica.reset_inner_state()
        self._began = self.clock()

    def _load(self, told: Mapping[int, Message]) -> None:
        assert self._anchors is not None
        for rank, names in self.party.parts.items():
            tensors = iter(
                told[rank].tensors[1:] if rank == self.party.first else told[rank].tensors
            )
            for name in names:
                self._anchors.values[name].copy_(next(tensors))
            if rank == self.party.first:
                for b in self.party.buffers.values():
                    b.copy_(next(tensors))
        self._anchors.write_back(self.replica.parameters)

    def _next_of_all(self) -> dict[int, Message]:
        """The next message of each server. What goes wrong with any of them is raised at once; that one of them
        leaves after its last message is none of that."""
        assert self._transport is not None
        end = time.monotonic() + self.options.timeout_s
        told: dict[int, Message] = {}
        while waiting := [rank for rank in self.options.servers if rank not in told]:
            left = end - time.monotonic()
            ready = self._transport.wait_some([self._pending[rank] for rank in waiting], left)
            if not ready:
                raise TimeoutError(
                    f"server rank {waiting[0]} sent nothing for timeout_s={self.options.timeout_s:g} s; look at it, "
                    "or raise the limit"
                )
            for place in ready:
                rank = waiting[place]
                told[rank] = self._result(self._pending[rank])
        for rank in told:
            self._pending[rank] = self._transport.irecv(rank)
        return told

    def _result(self, pending: Pending) -> Message:
        try:
            return pending.result()
        except (PeerLost, TransportClosed) as error:
            self.training = False
            raise RankFailure(str(error)) from error

    def _send(self, rank: int, news: Message) -> None:
        assert self._transport is not None
        try:
            self._transport.isend(rank, news)
        except PeerLost:
            pass  # its next message says why, or that training had ended before

    def _record(self, waited: float) -> None:
        assert self._transport is not None
        sent = self._transport.sent
        now = (sent.payload_bytes, sent.wire_bytes, sent.rounds, sent.seconds)
        payload, wire, rounds, seconds = (b - a for a, b in zip(self._before, now, strict=True))
        dense = sum(p.numel() * p.element_size() for p in self.replica.parameters.values())
        self._last_step = StepStats(
            step=self.step - 1,
            dense_bytes=dense if rounds else 0,
            payload_bytes=int(payload),
            wire_bytes=int(wire),
            rounds=int(rounds),
            comm_seconds=float(seconds),
            exposed_comm_seconds=waited,
            num_contributors=1 if rounds else 0,
        )
        self._before = now

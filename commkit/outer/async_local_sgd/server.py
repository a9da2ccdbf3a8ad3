"""The ranks that hold the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Self

from ...runtime.alarm import RankFailure
from ...runtime.session import Session
from ...transport import PeerLost, TorchTransport
from ..delayed_nesterov import PushRule
from .dispatch import Dispatcher
from .follower import Follower
from .options import AsyncOptions
from .protocol import Kind, Party, message
from .sequencer import Sequencer
from .stats import AsyncStats, PushRecord

OnPush: TypeAlias = Callable[[PushRecord], None]


class AsyncServer(Session):
    """Holds the weights and takes what workers push, in whatever order it comes.

    Asynchronous local SGD (Liu et al. 2024): a worker downloads weights, does some inner steps on a shard of the
    data, pushes how far it went and goes on from what is then newest. Nobody waits for the slowest. Pushes are applied one
    after another (linearizable), by ``rule``; every download is of one version, also from several servers. A worker whose
    process dies, or that takes far too long, loses its lease and its shard goes to the next one. An error here
    raises :class:`~commkit.RankFailure` on all workers at their next step, and the other way round.

    ::

        options = AsyncOptions(sync_every=100)
        if rank in options.servers:
            with AsyncServer(model, DelayedNesterov(), options) as server:
                server.serve(pushes=2000)
        else:
            with AsyncWorker(model, optimizer, options) as worker:
                while worker.training:
                    ...  # one ordinary step on worker.shard, at worker.shard_step

    State: what the rule keeps (12 bytes per parameter of this server's part with delayed Nesterov), in host memory.
    Wire: a task sends 4 bytes per parameter down, and up what the compressor makes of as much.

    Args:
        model: whose weights training starts from (the first server's count), and which holds this server's part of
            them when :meth:`serve` returns.
        rule: what a push does; :class:`~commkit.outer.delayed_nesterov.DelayedNesterov` is the paper's.
        options: the same on all ranks.
        process_group: servers and workers; None is the default group.

    Attributes:
        stats: totals since the start; those of staleness in particular.
        rule: with the weights.
        buffers: batch-norm statistics by name (first server only).

    Raises:
        ValueError: this rank is not in ``options.servers``, or what :class:`AsyncOptions` refuses.
        RuntimeError: torch.distributed is not initialised.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: PushRule,
        options: AsyncOptions | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.options = AsyncOptions() if options is None else options
        self.model = model
        self.rule = rule
        self.party = Party(model, self.options, process_group)
        if self.party.rank not in self.options.servers:
            raise ValueError(
                f"rank {self.party.rank} is not in servers={self.options.servers}; make an AsyncWorker there"
            )
        self.stats = AsyncStats()
        self.dispatcher = Dispatcher(self.options, self.party.workers)
        self.buffers = {
            name: b.detach().to("cpu", copy=True) for name, b in self.party.buffers.items()
        }
        self._transport: TorchTransport | None = None

    @property
    def names(self) -> list[str]:
        """The parameters of this server's part."""
        return self.party.parts[self.party.rank]

    @property
    def transport(self) -> TorchTransport:
        """
        Raises:
            RuntimeError: not started.
        """
        if self._transport is None:
            raise RuntimeError("the server is not started; use it in a with block")
        return self._transport

    def start(self) -> Self:
        """Meet all other ranks. Collective.

        Raises:
            RuntimeError: ranks disagree; the differing field is named.
            ValueError: the rule does not fit the number of workers.
        """
        party = self.party
        weights = {name: party.parameters[name].detach().to("cpu") for name in self.names}
        error: Exception | None = None
        try:
            self.rule.bind(weights, len(party.workers))
        except Exception as failure:
            error = failure
        others = [rank for rank in self.options.servers if rank != party.rank]
        self._transport = party.join(error, [*party.workers, *others])
        if party.rank == party.first:
            for rank in party.others:
                start = [
                    self._spec(),
                    *(party.parameters[name].detach() for name in party.parts[rank]),
                ]
                self._transport.isend(rank, message(Kind.START, 0, 0, start))
        else:
            try:
                self._follow_first()
            except BaseException as failure:
                self.close(f"{type(failure).__name__}: {failure}")
                raise
        return self

    def serve(
        self,
        pushes: int | None = None,
        steps: int | None = None,
        on_push: OnPush | None = None,
    ) -> AsyncStats:
        """Run until enough is done, then send the final weights to all workers, whose ``training`` becomes false.

        A buffer that is not full at the end is applied as if it were.

        Args:
            pushes: to accept, those before a resumed checkpoint included.
            steps: inner steps in accepted pushes, likewise.
            on_push: called after every accepted push, with this server's weights in ``rule.weights``: for
                logging, evaluation and checkpoints. It holds up everybody. With several servers each calls its
                own after the same pushes.

        Raises:
            ValueError: neither limit is given.
            RankFailure: another server, or with ``on_worker_error="raise"`` a worker, failed; or no worker is left.
            TimeoutError: nothing came for ``options.timeout_s``.
            FloatingPointError: nothing finite comes any more.
        """
        if pushes is None and steps is None:
            raise ValueError("serve() needs pushes=... or steps=..., or it would never end")
        try:
            with torch.no_grad():
                if self.party.rank == self.party.first:
                    Sequencer(self, pushes, steps, on_push).run()
                else:
                    Follower(self, on_push).run()
        except BaseException as error:
            self.close(f"{type(error).__name__}: {error}")
            raise
        self.write_back()
        return self.stats

    @torch.no_grad()
    def write_back(self) -> None:
        """Put this server's weights, and on the first one the buffers, into the model."""
        for name, weight in self.rule.weights.items():
            self.party.parameters[name].copy_(weight)
        for name, b in self.buffers.items():
            self.party.buffers[name].copy_(b)

    def close(self, error: str | None = None) -> None:
        """Leave; with ``error``, tell everybody why."""
        if self._transport is not None:
            self._transport.close(error)

    def state_dict(self) -> dict[str, Any]:
        """Weights, momentum, buffer and place in it, and where each shard is; between pushes, so call it in
        ``on_push`` or outside :meth:`serve`. Tasks that are out are not part of it: they are given anew.
        Tensors are not copied."""
        return {
            "rule": self.rule.state_dict(),
            "shards": self.dispatcher.state_dict(),
            "buffers": dict(self.buffers),
            "stats": {"pushes": self.stats.pushes, "steps": self.stats.steps},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; after :meth:`start`, before :meth:`serve`. Another number of servers may load it
        if the tensors of all old ones were put together.

        Raises:
            ValueError: another rule, another number of shards, or a parameter is missing.
        """
        self.rule.load_state_dict(state["rule"])
        self.dispatcher.load_state_dict(state["shards"])
        for name, b in self.buffers.items():
            b.copy_(state["buffers"][name])
        self.stats.pushes, self.stats.steps = state["stats"]["pushes"], state["stats"]["steps"]

    def merge_buffers(self, arrived: list[Tensor]) -> None:
        """Move the buffers towards those of a push."""
        share = 1 / len(self.party.workers)
        for (name, b), x in zip(self.buffers.items(), arrived, strict=True):
            if b.is_floating_point():
                b.lerp_(x, share)
            elif name.endswith("num_batches_tracked"):
                torch.maximum(b, x, out=b)
            else:
                b.copy_(x)

    def outgoing(self) -> list[Tensor]:
        """This server's part of what a worker downloads."""
        return [self.rule.weights[name] for name in self.names]

    def _follow_first(self) -> None:
        """Start from the first server's weights."""
        pending = self.transport.irecv(self.party.first)
        if not self.transport.wait_some([pending], self.options.timeout_s):
            raise TimeoutError(
                f"rank {self.party.first} sent no weights for {self.options.timeout_s:g} s"
            )
        try:
            start = pending.result()
        except PeerLost as error:
            raise RankFailure(str(error)) from error
        theirs, *weights = start.tensors
        if not torch.equal(theirs, self._spec()):
            raise ValueError(
                f"servers disagree on the rule: rank {self.party.first} has {bytes(theirs.tolist()).decode()}, rank "
                f"{self.party.rank} {bytes(self._spec().tolist()).decode()}; give all servers the same"
            )
        for name, weight in zip(self.names, weights, strict=True):
            self.rule.weights[name].copy_(weight)

    def _spec(self) -> Tensor:
        return torch.tensor(list(json.dumps(self.rule.spec()).encode()), dtype=torch.uint8)

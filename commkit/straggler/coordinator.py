"""The ranks that hold the weights, hand them out and collect gradients."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from ..runtime.alarm import RankFailure
from ..runtime.session import Session
from ..transport import Network, PeerLost, TorchNetwork, Transport
from .gate import Gate
from .methods import Method
from .options import CoordinationOptions
from .partitions import BatchLayout
from .protocol import Kind, Party, message
from .record import CoordinationStats, StepRecord
from .results import Results, squared
from .ring import Ring
from .rounds import Due

OnStep: TypeAlias = Callable[[StepRecord], None]
_CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_


class Outcome(NamedTuple):
    """A job's gradient, of one coordinator's part.

    Args:
        gradient: by name, on the CPU; None: it cannot be had.
        norms: (1 + vectors, names) float64: squares of 2-norms, of the gradient and then of each vector in it.
    """

    gradient: dict[str, Tensor] | None
    norms: Tensor


class Coordinator(Session):
    """Hands out the weights in rounds, takes the gradients of those that are in time, and goes on without the others.

    Which gradients make a step exact, or good enough, is the business of ``method``: backup workers, gradient coding,
    sequential gradient coding. A worker that is late drops what it does and joins the round that is under way; one whose
    process dies is a straggler for ever, and training goes on as long as the method can do without it.

    ::

        method, options = Coding(num_stragglers=1), CoordinationOptions()
        if rank in options.coordinators:
            with Coordinator([model], [optimizer], method, batch=256) as coordinator:
                coordinator.run(jobs=1000)
        else:
            with Worker(model, method, batch=256) as worker:
                worker.run(lambda share: loss(model, data[share.samples]))

    State: the optimizer's; T + 1 copies of the weights as workers have them; and the vectors of jobs under way, as
    they came. Wire: each round sends the weights to every worker, and what their plan says back.

    Args:
        models: whose parameters are trained, in host memory or on a GPU. One; T + 1 with
            ``options.interleave="models"`` and a method whose delay is T. The first coordinator's weights count.
        optimizers: one for each model, over all its parameters; each coordinator steps its own part alone.
        method: what to do about stragglers; the same on all ranks.
        options: the same on all ranks.
        batch: samples of one job, over all workers; a multiple of the units into which the method cuts it.
        max_grad_norm: gradients longer than this are scaled down to it; 0 turns it off.
        before_step: called with the model's number and its step before the optimizer steps, on every
            coordinator: to set the learning rate.
        network: all ranks; None is the default process group.
        clock: seconds from any start, by which rounds are judged and timed; never runs backwards. Timeouts go by
            the transport's in any case.

    Attributes:
        stats: totals (first coordinator only).
        rounds: the method at work.
        gate: who has come in the round under way, or in the last one (first coordinator only).
        residual_norm: 2-norm of what the compressor of the weights has left unsent of this part.

    Raises:
        ValueError: this rank is no coordinator, or a number does not fit; the message says which.
        RuntimeError: torch.distributed is not initialised.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
        method: Method,
        options: CoordinationOptions | None = None,
        *,
        batch: int,
        max_grad_norm: float = 0.0,
        before_step: Callable[[int, int], None] | None = None,
        network: Network | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options = CoordinationOptions() if options is None else options
        self.models, self.optimizers, self.method = list(models), list(optimizers), method
        self.max_grad_norm, self.before_step, self.clock = max_grad_norm, before_step, clock
        network = TorchNetwork() if network is None else network
        self.party = Party(self.models[0], self.options, network)
        party = self.party
        if party.rank not in self.options.coordinators:
            raise ValueError(
                f"rank {party.rank} is not in coordinators={self.options.coordinators}; make a Worker there"
            )
        self.rounds = method.build(len(party.workers))
        self.layout = BatchLayout(batch, self.rounds.num_units)
        check_models(self.models, self.optimizers, self.rounds.delay, self.options)
        self._weights = [
            {name: p for name, p in model.named_parameters() if name in set(self.names)}
            for model in self.models
        ]
        self.ring = Ring(party.weights, self.rounds.delay, len(self.models) == 1, self._weights)
        self.results = Results(party.gradients, self.names)
        self.stats = CoordinationStats()
        self.gate = Gate(self.rounds, self.options.grace_s, 0.0, set())
        self.buffers = {n: b.detach().to("cpu", copy=True) for n, b in party.buffers.items()}
        self._changed = [False] * len(self.models)  # since workers were told
        self._transport: Transport | None = None
        self.residual_norm = 0.0
        self.tag = 0  # of the state that workers were last asked to save

    @property
    def names(self) -> list[str]:
        """The parameters of this coordinator's part."""
        return self.party.parts[self.party.rank]

    @property
    def is_first(self) -> bool:
        return self.party.rank == self.party.first

    @property
    def transport(self) -> Transport:
        """
        Raises:
            RuntimeError: not started.
        """
        if self._transport is None:
            raise RuntimeError("the coordinator is not started; use it in a with block")
        return self._transport

    def __enter__(self) -> Self:
        return self if self._transport is not None else self.start()

    def start(self) -> Self:
        """Meet all other ranks. Collective.

        Raises:
            RuntimeError: ranks disagree; the differing field is named.
        """
        party = self.party
        others = [rank for rank in self.options.coordinators if rank != party.rank]
        self._transport = party.join(
            None, [*party.workers, *others], self.method.spec() | {"batch": self.layout.batch}
        )
        if self.is_first:
            for rank in party.others:
                start = [
                    model.get_parameter(name).detach()
                    for model in self.models
                    for name in party.parts[rank]
                ]
                self._transport.isend(rank, message(Kind.START, 0, 0, start))
        else:
            try:
                self._follow_first()
            except BaseException as failure:
                self.close(f"{type(failure).__name__}: {failure}")
                raise
        return self

    def run(
        self,
        jobs: int,
        on_step: OnStep | None = None,
        whole_at: Callable[[int], bool] | None = None,
    ) -> CoordinationStats:
        """Train until ``jobs`` jobs are done, then send the final weights to all workers.

        Args:
            jobs: in all, those before a resumed checkpoint included.
            on_step: called after every job, on every coordinator: for logging, evaluation and checkpoints. It
                holds up everybody.
            whole_at: for which jobs the first coordinator's models shall hold all weights in ``on_step``, also
                those of other coordinators' parts. They always do at the end.

        Raises:
            NotDecodable: workers are lost without whom the gradient cannot be had; they are named.
            RankFailure: another coordinator, or with ``on_worker_error="raise"`` a worker, failed.
            TimeoutError: nothing came for ``options.timeout_s``; who is awaited is named.
            FloatingPointError: nothing finite comes any more.
        """
        from .follower import Follower
        from .leader import Leader

        self.rounds.limit(jobs)
        try:
            if self.is_first:
                Leader(self, on_step, whole_at).run()
            else:
                Follower(self, on_step).run()
        except BaseException as error:
            self.close(f"{type(error).__name__}: {error}")
            raise
        return self.stats

    def close(self, error: str | None = None) -> None:
        """Leave; with ``error``, tell everybody why."""
        if self._transport is not None:
            self._transport.close(error)

    def stop(self) -> None:
        """Begin no more jobs, and end when those under way are finished. Of the first coordinator, in ``on_step``."""
        self.rounds.limit(0)

    def save_workers(self, tag: int) -> None:
        """Ask all workers to save their state under number ``tag`` (> 0) before they compute the next round. Of the
        first coordinator, in ``on_step``."""
        self.tag = tag

    def state_dict(self) -> dict[str, Any]:
        """This part's weights, optimizer state and unsent rest, the scheme's state, and what has arrived of jobs under
        way; between jobs, so call it in ``on_step`` or outside :meth:`run`. Workers' residuals are theirs to save.
        Only vectors under way are copied."""
        return {
            "weights": [dict(weights) for weights in self._weights],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ring": self.ring.state_dict(),
            "changed": list(self._changed),
            "rounds": self.rounds.state_dict(),
            "results": self.results.state_dict(),
            "buffers": dict(self.buffers),
            "workers": len(self.party.workers),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], job: int | None = None) -> None:
        """Go on from ``state``; after :meth:`start`, before :meth:`run`.

        Args:
            job: the one to go on with if the number of workers is another one; what had arrived of it and later ones is
                done anew.

        Raises:
            ValueError: another scheme, or another number of workers and no ``job``.
        """
        for mine, theirs in zip(self._weights, state["weights"], strict=True):
            for name, x in mine.items():
                x.copy_(theirs[name])
        for optimizer, theirs in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(theirs)
        for name, b in self.buffers.items():
            b.copy_(state["buffers"][name])
        if state["workers"] == len(self.party.workers):
            self.rounds.load_state_dict(state["rounds"])
            self.ring.load_state_dict(state["ring"])
            self.results.load_state_dict(state["results"])
            self._changed = list(state["changed"])
        elif job is None:
            raise ValueError(
                f"the state is of {state['workers']} workers and there are {len(self.party.workers)}; start as many, "
                "or say with which job to go on"
            )
        else:
            self.rounds.restart(job)
            self.ring.reset(self._weights)

    # For the two loops.

    def model_of(self, job: int) -> int:
        return job % len(self.models)

    def begin(self, job: int | None) -> list[Tensor] | None:
        """What to send at the beginning of a round in which ``job`` begins; None: nothing."""
        if job is None:
            return None
        model, number = self.model_of(job), self.rounds.number
        changes = None
        if self._changed[model]:
            changes = self.ring.encode(job, self._weights[model], number)
            self._changed[model] = False
        self.ring.begin(job, changes, self.names, number)
        if self.options.broadcast is not None:
            self.residual_norm = self._unsent(job)
        return changes

    def _unsent(self, job: int) -> float:
        mine, theirs = self._weights[self.model_of(job)], self.ring.of_job(job)
        parts = (x.detach().cpu().double() - theirs[name].double() for name, x in mine.items())
        return math.sqrt(sum(map(squared, parts)))

    def whole(self) -> list[Tensor]:
        """All that a worker has of this part, in full."""
        return [*self.ring.whole(), *(self.buffers.values() if self.is_first else ())]

    def final(self) -> list[Tensor]:
        """The newest weights of this part, of all models, and the buffers."""
        weights = [x.detach() for mine in self._weights for x in mine.values()]
        return [*weights, *(self.buffers.values() if self.is_first else ())]

    def combine(self, due: Due) -> Outcome:
        """The gradient of a job that is due."""
        names = self.names
        if due.weights is None:
            self.results.forget(due.job)
            return Outcome(None, torch.zeros(1, len(names), dtype=torch.float64))
        gradient, norms = self.results.combine(due.job, due.weights)
        if not self.rounds.wants_norms:
            norms = []
        own = [squared(gradient[name]) for name in names]
        self.results.forget(due.job)
        return Outcome(
            gradient, torch.tensor([own, *norms], dtype=torch.float64).view(-1, len(names))
        )

    def scale(self, norm: float) -> float:
        """What a gradient of this length is multiplied with."""
        if not self.max_grad_norm:
            return 1.0
        return min(1.0, self.max_grad_norm / (norm + _CLIP_EPSILON))

    def apply(self, job: int, gradient: Mapping[str, Tensor], scale: float) -> None:
        """One step of this part of the job's model."""
        model = self.model_of(job)
        if self.before_step is not None:
            self.before_step(model, job // len(self.models))
        for p in self.models[model].parameters():
            p.grad = None
        with torch.no_grad():
            for name, p in self._weights[model].items():
                p.grad = (gradient[name] * scale).to(p.device, p.dtype)
        self.optimizers[model].step()
        for p in self.models[model].parameters():
            p.grad = None
        self._changed[model] = True

    @torch.no_grad()
    def take_part(self, rank: int, tensors: Sequence[Tensor]) -> None:
        """Another coordinator's weights, into this one's models."""
        incoming = iter(tensors)
        for model in self.models:
            for name in self.party.parts[rank]:
                model.get_parameter(name).copy_(next(incoming))

    @torch.no_grad()
    def write_buffers(self) -> None:
        """Put the buffers into the model."""
        for name, b in self.buffers.items():
            self.party.buffers[name].copy_(b)

    def _follow_first(self) -> None:
        """Start from the first coordinator's weights."""
        pending = self.transport.irecv(self.party.first)
        if not self.transport.wait_some([pending], self.options.timeout_s):
            raise TimeoutError(
                f"rank {self.party.first} sent no weights for {self.options.timeout_s:g} s"
            )
        try:
            start = pending.result()
        except PeerLost as error:
            raise RankFailure(str(error)) from error
        incoming = iter(start.tensors)
        with torch.no_grad():
            for mine in self._weights:
                for name in self.names:
                    mine[name].copy_(next(incoming))
        self.ring.reset(self._weights)


def check_models(
    models: Sequence[nn.Module],
    optimizers: Sequence[Optimizer],
    delay: int,
    options: CoordinationOptions,
) -> None:
    """
    Raises:
        ValueError: not as many models or optimizers as the scheme needs.
    """
    wanted = delay + 1 if options.interleave == "models" else 1
    if len(models) != wanted or len(optimizers) != wanted:
        raise ValueError(
            f"models and optimizers must be {wanted} each, as interleave={options.interleave!r} has it with a delay "
            f"of {delay}; got {len(models)} and {len(optimizers)}"
        )
    if wanted > 1 and any(True for _ in models[0].buffers()):
        raise ValueError(
            "interleave='models' cannot tell apart the buffers of models that take turns on one worker; use "
            "interleave='stale', or a normalisation without running statistics, such as GroupNorm"
        )

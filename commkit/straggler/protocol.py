"""What coordinators and workers say to each other.

The first coordinator decides when a round begins, for whom, and who was late; it tells the others, which send
their part of the weights in the same order. A worker sends its vectors to every coordinator, each one its
part. A coordinator that is not the first acknowledges its part to the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..registry import spec
from ..runtime.agreement import Gathers, agree, trainable_parameters
from ..runtime.codec import Codec, divided
from ..transport import Message, Network, Transport
from .options import CoordinationOptions
from .schedule import Chunk, MiniTask


class Kind(IntEnum):
    """Of messages; ``sequence`` is the number of the round throughout."""

    ROUND = 0  # first coordinator -> worker: weights and mini-tasks; version: the last round that it was in time for
    PART = 1  # other coordinator -> worker: its part of the weights
    WHOLE = 2  # coordinator -> worker: everything it holds, in full
    STOP = 3  # coordinator -> worker: the last weights; version as in ROUND
    RESULT = 4  # worker -> coordinators: its vectors
    LATE = 5  # worker -> first coordinator: it knows that the round is over; version 1: it has finished nevertheless
    GOT = 6  # other coordinator -> first: a worker's vectors are here; version: whose
    GONE = 7  # other coordinator -> first: it has lost a worker; version: which
    TELL = 8  # first coordinator -> others: send your part of this round's weights
    CLOSE = 9  # first coordinator -> others: the round is over, and who was late
    NORMS = 10  # other coordinator -> first: of what came out
    STEP = 11  # first coordinator -> others: apply it
    DONE = 12  # first coordinator -> others: the end
    START = 13  # first coordinator -> others: the weights to start from
    WELCOME = 14  # first coordinator -> others: workers that are back join the round under way


class Plan(NamedTuple):
    """What comes with the weights of a round.

    Args:
        round: its number.
        tasks: to compute, in this order.
        tag: > 0 asks the worker to save its state under this number, before it computes.
    """

    round: int
    tasks: tuple[MiniTask, ...]
    tag: int = 0

    def pack(self) -> list[Tensor]:
        numbers, factors = [self.tag, len(self.tasks)], []
        for task in self.tasks:
            numbers += [task.job, task.worker, task.index, task.coded, len(task.chunks)]
            for chunk in task.chunks:
                numbers += [chunk.start, chunk.stop]
                factors.append(chunk.coefficient)
        return [torch.tensor(numbers), torch.tensor(factors, dtype=torch.float64)]

    @classmethod
    def unpack(cls, number: int, tensors: Sequence[Tensor]) -> Plan:
        numbers, factors = iter(tensors[0].tolist()), iter(tensors[1].tolist())
        tag, tasks = next(numbers), []
        for _ in range(next(numbers)):
            job, worker, index, coded = (next(numbers) for _ in range(4))
            chunks = tuple(
                Chunk(next(numbers), next(numbers), next(factors)) for _ in range(next(numbers))
            )
            tasks.append(MiniTask(job, worker, index, bool(coded), chunks))
        return cls(number, tuple(tasks), tag)


PLAN_TENSORS = 2


class Report(NamedTuple):
    """What comes with a worker's vectors.

    Args:
        seconds: of computing them, on its own clock.
        finite: whether they are; if not, nothing of them is sent.
        losses: of each mini-task, coded as its vector is: the same combination of partitions, so that the job's loss
            comes out with its gradient.
    """

    seconds: float
    finite: bool
    losses: tuple[float, ...]

    def pack(self) -> Tensor:
        return torch.tensor([self.seconds, self.finite, *self.losses], dtype=torch.float64)

    @classmethod
    def unpack(cls, x: Tensor) -> Report:
        seconds, finite, *losses = x.tolist()
        return cls(seconds, bool(finite), tuple(losses))


class Party:
    """What coordinators and workers have in common: who is what, and how tensors travel.

    Args:
        model: parameters and buffers, the same on all ranks.
        options: the same on all ranks.
        network: the ranks.

    Raises:
        ValueError: no rank is left to train, or see
            :func:`~commkit.runtime.agreement.trainable_parameters`.
    """

    def __init__(self, model: nn.Module, options: CoordinationOptions, network: Network) -> None:
        self.options, self.network = options, network
        self.parameters = trainable_parameters(model)
        self.buffers = dict(model.named_buffers())
        self.rank = network.rank
        self.workers = options.workers(network.world_size)
        like = {name: p.detach() for name, p in self.parameters.items()}
        self.gradients = Codec(options.compressor, options.policy, options.seed, like)
        self.weights = Codec(options.broadcast, options.policy, options.seed, like)
        coordinators = options.coordinators
        self.parts = dict(zip(coordinators, divided(like, len(coordinators)), strict=True))
        """Names of each coordinator's parameters."""

    @property
    def first(self) -> int:
        """The coordinator that decides."""
        return self.options.coordinators[0]

    @property
    def others(self) -> tuple[int, ...]:
        return tuple(self.options.coordinators[1:])

    def join(
        self, error: Exception | None, peers: Sequence[int], method: Mapping[str, Any]
    ) -> Transport:
        """Agree with everybody, and open the transport. Collective.

        Raises:
            RuntimeError: ranks disagree, or one of them refused.
        """
        gathers: Gathers = self.network
        agree(gathers, {"method": method, **self._fingerprint()}, error)
        # A worker that returns gets everything in full, a round and maybe the end besides what it has missed;
        # between coordinators, every worker may have several messages under way.
        queue_size = 4 + self.options.max_behind + 4 * len(self.workers)
        return self.network.open(peers=peers, queue_size=queue_size)

    def _fingerprint(self) -> Mapping[str, Any]:
        return {
            "options": {name: spec(getattr(self.options, name)) for name in self.options.__slots__},
            "parameters": {n: f"{tuple(p.shape)} {p.dtype}" for n, p in self.parameters.items()},
            "buffers": {n: f"{tuple(b.shape)} {b.dtype}" for n, b in self.buffers.items()},
        }


def message(kind: Kind, sequence: int, version: int = 0, tensors: Sequence[Tensor] = ()) -> Message:
    return Message(int(kind), sequence, version, tuple(tensors))


class ProtocolError(RuntimeError):
    """A message that nobody sends at this point: ranks run different programs, or versions of one."""

    def __init__(self, rank: int, news: Message, round_: int) -> None:
        known = news.kind in set(Kind)
        what = f"{Kind(news.kind).name} of round {news.sequence}" if known else f"kind {news.kind}"
        super().__init__(
            f"rank {rank} sent a message of {what} in round {round_}, where there is none; start all ranks "
            "with the same program and version"
        )

"""What servers and workers say to each other.

A worker sends its push to every server, each one its part. A server that is not the first acknowledges its part to
the first, which then decides: ``ORDER`` or ``DROP`` to the other servers, in one sequence for all. In the same
sequence ``HAND`` tells them to send a worker their part of the weights, so that every download is of one version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...comm import DistComm, require_group
from ...registry import spec
from ...runtime.agreement import agree, trainable_parameters
from ...runtime.codec import Codec, divided
from ...transport import Message, TorchTransport
from .options import AsyncOptions


class Kind(IntEnum):
    """Of messages; ``sequence`` is the number of the lease throughout."""

    PUSH = 0  # worker -> servers
    TASK = 1  # first server -> worker: with the first server's part of the weights
    PART = 2  # other server -> worker: its part of them
    GOT = 3  # other server -> first: a push's part is here
    GONE = 4  # other server -> first: it has lost a worker
    ORDER = 5  # first server -> others: apply that push now; version is its staleness
    DROP = 6  # first server -> others: forget that push
    HAND = 7  # first server -> others: send a worker your part
    DONE = 8  # first server -> others: the end
    START = 9  # first server -> others: its rule, and the weights to start from


class Stop(IntEnum):
    """Whether weights that are handed out are the last."""

    NO = 0
    YES = 1  # to a worker that may be stuck
    WAITED_FOR = 2


class Report(NamedTuple):
    """What comes with a push.

    Args:
        steps: inner steps that were done.
        seconds: that they took.
        finite: whether the pseudo-gradient is; if not, nothing of it is sent.
        loss: mean over the task's steps, as the worker was told; NaN if it was not.
    """

    steps: int
    seconds: float
    finite: bool
    loss: float

    def pack(self) -> Tensor:
        return torch.tensor(list(self), dtype=torch.float64)

    @classmethod
    def unpack(cls, x: Tensor) -> Report:
        steps, seconds, finite, loss = x.tolist()
        return cls(int(steps), seconds, bool(finite), loss)


class Task(NamedTuple):
    """What comes with the weights.

    Args:
        shard: of the data to train on.
        steps: inner steps to do.
        first_step: the shard's step count.
        accepted: number of this worker's lease whose push is in these weights; -1 if its last was dropped, or
            there is none.
        stop: training has ended; the weights are the last.
    """

    shard: int
    steps: int
    first_step: int
    accepted: int
    stop: bool

    def pack(self) -> Tensor:
        return torch.tensor([int(x) for x in self], dtype=torch.int64)

    @classmethod
    def unpack(cls, x: Tensor) -> Task:
        shard, steps, first_step, accepted, stop = x.tolist()
        return cls(shard, steps, first_step, accepted, bool(stop))


class Party:
    """What servers and workers have in common: the group, who is what in it, and the way to each other.

    Args:
        model: parameters and buffers, the same on all ranks.
        options: the same on all ranks.
        process_group: None is the default group.
    """

    def __init__(
        self, model: nn.Module, options: AsyncOptions, process_group: dist.ProcessGroup | None
    ) -> None:
        self.options = options
        self.parameters = trainable_parameters(model)
        self.buffers = dict(model.named_buffers()) if options.average_buffers else {}
        self.group = require_group(process_group)
        self.rank = dist.get_rank(self.group)
        self.workers = options.workers(dist.get_world_size(self.group))
        like = {name: p.detach() for name, p in self.parameters.items()}
        self.codec = Codec(options.compressor, options.policy, options.seed, like)
        self.parts = dict(zip(options.servers, divided(like, len(options.servers)), strict=True))
        """Names of each server's parameters."""

    @property
    def first(self) -> int:
        """The server that decides."""
        return self.options.servers[0]

    @property
    def others(self) -> tuple[int, ...]:
        return self.options.servers[1:]

    def join(self, error: Exception | None, peers: Sequence[int]) -> TorchTransport:
        """Agree with everybody, and open the transport. Collective.

        Raises:
            RuntimeError: ranks disagree, or one of them refused.
        """
        agree(DistComm(self.group), self._fingerprint(), error)
        # Between servers, every worker may have several messages under way.
        return TorchTransport(self.group, peers=peers, queue_size=8 + 4 * len(self.workers))

    def _fingerprint(self) -> Mapping[str, Any]:
        return {
            "method": "asynchronous local SGD",
            "options": {
                **{
                    name: getattr(self.options, name)
                    for name in self.options.__slots__
                    if name not in ("compressor", "policy")
                },
                "compressor": spec(self.options.compressor),
                "policy": spec(self.options.policy),
            },
            "parameters": {n: f"{tuple(p.shape)} {p.dtype}" for n, p in self.parameters.items()},
            "buffers": {n: f"{tuple(b.shape)} {b.dtype}" for n, b in self.buffers.items()},
        }


def message(kind: Kind, sequence: int, version: int = 0, tensors: Sequence[Tensor] = ()) -> Message:
    return Message(int(kind), sequence, version, tuple(tensors))

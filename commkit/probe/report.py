"""``probe.json``: what a probe found, as data that later versions can tell apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from ..config import ConfigError, load_yaml, validate
from ..cost.cluster import Link
from ..cost.pace import Pace
from ..cost.shapes import Shapes, shapes_of

VERSION: Final = 1
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Op = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"]


class ProbeError(ConfigError):
    """A probe that cannot be used; the message says why and what to do."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LinkFound(_Part):
    """Alpha and beta of messages between two ranks, one way."""

    latency_s: NonNegative
    bytes_per_second: Positive
    """That a program gets, headers off."""
    spread: NonNegative
    """Of repeated large messages: relative standard deviation."""

    @property
    def link(self) -> Link:
        return Link(self.bytes_per_second, self.latency_s, self.spread)


class PairFound(LinkFound):
    first: Annotated[int, Field(ge=0)]
    second: Annotated[int, Field(ge=0)]
    inside_node: bool


class CollectiveFound(_Part):
    op: Op
    latency_s: NonNegative
    """Of a few bytes."""
    bytes_per_second: Positive
    """Of what a rank hands over, at large sizes."""
    samples: list[tuple[int, float]]
    """Payload bytes and median seconds, of the slowest rank."""


class ClusterFound(_Part):
    nodes: Count
    ranks_per_node: Count
    backend: str
    device: str
    threads: Count
    """Of each rank."""
    cores: Count
    """Of a machine."""
    ranks_per_machine: Count
    """More than ``ranks_per_node`` where nodes are emulated on one machine."""

    @property
    def contention(self) -> float:
        """Threads that want a core, for each core; at most 1 where everybody has one."""
        return self.ranks_per_machine * self.threads / self.cores


class ModelFound(_Part):
    fingerprint: str
    matrix_numel: Annotated[int, Field(ge=0)]
    sides: Annotated[int, Field(ge=0)]
    matrices: Annotated[int, Field(ge=0)]
    vector_numel: Annotated[int, Field(ge=0)]

    @property
    def shapes(self) -> Shapes:
        return Shapes(self.matrix_numel, self.sides, self.matrices, self.vector_numel)


class ComputeFound(_Part):
    """A step with a hook that sends nothing: medians over steps, of the slowest rank."""

    step_s: Positive
    forward_s: NonNegative
    backward_s: Positive
    """Of the last micro-batch, beside which gradients are sent."""
    optimizer_s: NonNegative
    first_bucket_s: NonNegative
    """Into that backward, when DDP's first bucket is full."""
    spread: NonNegative

    @property
    def head_room_s(self) -> float:
        """What backward can hide of communication."""
        return max(0.0, self.backward_s - self.first_bucket_s)


class CompressionFound(_Part):
    scheme: str
    alone: Annotated[float, Field(allow_inf_nan=False)]
    """Seconds per element of a step or round, see :class:`~commkit.cost.pace.Pace`."""
    each: NonNegative
    step: NonNegative = 0.0

    @property
    def pace(self) -> Pace:
        return Pace(self.alone, self.each, self.step)


class MemoryFound(_Part):
    """Of one rank, in bytes."""

    share: Positive
    """Of the machine's, or the GPU's."""
    peak: Positive
    """Of a step without communication, everything that the process holds included."""


class Probe(_Part):
    """One probe. ``link`` is that of a pair on different nodes, the slowest found; ``local`` of one inside a node; either
    None where there is no such pair."""

    version: Literal[1]
    commkit: str
    date: str
    cluster: ClusterFound
    model: ModelFound
    link: LinkFound | None
    local: LinkFound | None
    pairs: list[PairFound]
    collectives: list[CollectiveFound]
    send_cpu_s_per_byte: NonNegative
    """Processor time of a rank in a large all-reduce, by the bytes that it sends."""
    compute: ComputeFound
    compression: list[CompressionFound]
    memory: MemoryFound

    def pace(self, scheme: str) -> Pace:
        """
        Raises:
            ProbeError: the scheme was not timed.
        """
        for one in self.compression:
            if one.scheme == scheme:
                return one.pace
        raise ProbeError(
            f"probe: scheme {scheme!r} was not timed; probe again with --schemes {scheme}, or leave it out"
        )

    def require_ranks(self, number: int) -> None:
        """
        Raises:
            ProbeError: the probe is of another number of ranks.
        """
        found = self.cluster.nodes * self.cluster.ranks_per_node
        if found != number:
            raise ProbeError(
                f"probe: it is of {found} ranks, this run has {number}; probe with as many, or leave the probe out"
            )

    def require_model(self, module: nn.Module) -> None:
        """
        Raises:
            ProbeError: the probe is of another model.
        """
        found = fingerprint(module)
        if found != self.model.fingerprint:
            numel = sum(p.numel() for p in module.parameters() if p.requires_grad)
            raise ProbeError(
                f"probe: it is of a model of {self.model.shapes.numel:,} parameters ({self.model.fingerprint}), "
                f"this one has {numel:,} ({found}); probe this model, or leave the probe out"
            )


def fingerprint(module: nn.Module) -> str:
    """Of names and shapes of the parameters that are trained."""
    lines = (f"{n}:{tuple(p.shape)}" for n, p in module.named_parameters() if p.requires_grad)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def model_found(module: nn.Module) -> ModelFound:
    shapes = shapes_of(_trained(module))
    return ModelFound(
        fingerprint=fingerprint(module),
        matrix_numel=shapes.matrix_numel,
        sides=shapes.sides,
        matrices=shapes.matrices,
        vector_numel=shapes.vector_numel,
    )


def _trained(module: nn.Module) -> Iterable[tuple[int, ...]]:
    return (tuple(p.shape) for p in module.parameters() if p.requires_grad)


def load_probe(path: str | Path) -> Probe:
    """Read and check a file.

    Raises:
        ProbeError: it cannot be read, is of another version, or lacks fields.
    """
    try:
        data = load_yaml(path)
        if data.get("version") != VERSION:
            raise ProbeError(
                f"{path}: version={data.get('version')!r} must be {VERSION}; run `commkit probe` of this version"
            )
        return validate(Probe, data, str(path))
    except ProbeError:
        raise
    except ConfigError as error:
        raise ProbeError(
            f"{error}; is it what `commkit probe` wrote? If not, probe again"
        ) from None

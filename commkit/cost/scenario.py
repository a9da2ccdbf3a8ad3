"""A scenario: the workers, links, faults and methods of one simulation, as a YAML file says it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..config import ConfigError, load_yaml, validate
from .cluster import Cluster, Link
from .shapes import Shapes, transformer
from .units import parse_bandwidth, parse_count, parse_seconds

Positive = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(gt=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LinkPart(_Part):
    """Of a node to the others, each way."""

    rate: str = "1gbit"
    """Nominal."""
    latency: str = "1ms"
    """One way, of a small message: the median."""
    latency_sigma: Annotated[float, Field(ge=0)] = 0.0
    """Of the logarithm of a message's latency; 0: they are all the same."""
    local_rate: str = "100gbit"
    """Between two ranks of a node."""

    @field_validator("rate", "local_rate")
    @classmethod
    def _rate(cls, text: str) -> str:
        parse_bandwidth(text, "rate")
        return text

    @field_validator("latency")
    @classmethod
    def _time(cls, text: str) -> str:
        parse_seconds(text, "latency")
        return text


class BurstPart(_Part):
    """Workers that become slow for a while, see :class:`~commkit.sim.Bursts`; per round."""

    enter: Probability
    leave: Probability
    slowdown: Annotated[float, Field(gt=1)]


class ComputePart(_Part):
    seconds: Positive
    """Of a step on a middling worker."""
    jitter: Annotated[float, Field(ge=0)] = 0.05
    """Sigma of the logarithm of a step's time."""
    spread: Annotated[float, Field(ge=0)] = 0.0
    """Sigma of the logarithm of workers' speeds, which stay as they are."""
    stragglers: BurstPart | None = None


class FailurePart(_Part):
    mean_seconds: Positive
    """Between failures of one worker."""
    restart_seconds: Positive
    """Until it works again; others of a synchronous method wait for it."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 10
    """Rounds: what is after the last checkpoint is computed again by synchronous methods."""


class MethodPart(_Part):
    scheme: str
    sync_every: Annotated[int, Field(ge=1)] | None = None
    """Steps of a round; None: the scheme's own."""


class Scenario(_Part):
    """What is simulated."""

    nodes: Annotated[int, Field(ge=1)]
    ranks_per_node: Annotated[int, Field(ge=1)] = 1
    model_size: str
    """Parameters, such as 7B."""
    compute: ComputePart
    methods: Annotated[list[MethodPart], Field(min_length=1)]
    link: LinkPart = LinkPart()
    failures: FailurePart | None = None
    rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    memory_gb: Positive | None = None
    """Of a rank; None: enough."""
    bytes_per_parameter: Positive = 16
    """That training keeps: weights, gradients, the optimizer's state."""
    seed: int = 0

    @field_validator("model_size")
    @classmethod
    def _size(cls, text: str) -> str:
        transformer(parse_count(text))
        return text

    @property
    def shapes(self) -> Shapes:
        return transformer(parse_count(self.model_size))

    @property
    def cluster(self) -> Cluster:
        latency = parse_seconds(self.link.latency, "latency")
        return Cluster(
            self.nodes,
            self.ranks_per_node,
            Link.of_rate(parse_bandwidth(self.link.rate), latency),
            Link.of_rate(parse_bandwidth(self.link.local_rate), min(latency, 1e-5)),
        )


def load_scenario(path: str | Path) -> Scenario:
    """Read and check a file.

    Raises:
        ConfigError: what :func:`~commkit.config.load_yaml` refuses, unknown fields, wrong values, or a model that does not
            fit a rank's memory.
    """
    scenario = validate(Scenario, load_yaml(path), str(path))
    needed = scenario.shapes.numel * scenario.bytes_per_parameter / 1e9
    if scenario.memory_gb is not None and needed > scenario.memory_gb:
        raise ConfigError(
            f"{path}: model_size={scenario.model_size} needs {needed:.1f} GB per rank at "
            f"bytes_per_parameter={scenario.bytes_per_parameter:g}, more than memory_gb={scenario.memory_gb:g}; "
            "shard the model (give the size of a shard), or give ranks more memory"
        )
    return scenario

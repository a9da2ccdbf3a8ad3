"""A scenario: the workers, links, faults and methods of one simulation, as a YAML file says it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..config import ConfigError, load_yaml, validate
from .cluster import Cluster, Link
from .predict import Workload
from .shapes import transformer
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
    settings: dict[str, Any] = {}
    """Of the scheme, such as ``fragments: 8``; as in a recipe."""
    name: str | None = None
    """What it is called here; None: as its scheme is."""

    @property
    def label(self) -> str:
        return self.scheme if self.name is None else self.name


class LabPart(_Part):
    """The same scenario small: on an emulated network of one machine, one rank to a node, with a model that it can train.
    What a lab cannot have (bursts of slowness, failures, log-normal latency) is left out there."""

    nodes: Annotated[int, Field(ge=2)] = 2
    rate: str = "100mbit"
    """Low enough for the small model's transfers to take of a round what the large one's do."""
    delay: str | None = None
    """One way, added to what the machine's own network takes; needs netem. None: nothing is added."""
    sync_every: Annotated[int, Field(ge=1)] = 8
    """Steps of a round at most."""
    rounds: Annotated[int, Field(ge=2)] = 4
    """Of each run; the first is not counted."""
    repeats: Annotated[int, Field(ge=1)] = 1
    """Runs of each method."""
    settings: dict[str, Any] = {}
    """Of the recipe that every method trains, by dotted name, such as ``model.width: 128``."""

    @field_validator("rate")
    @classmethod
    def _rate(cls, text: str) -> str:
        parse_bandwidth(text, "rate")
        return text

    @property
    def steps(self) -> int:
        return self.rounds * self.sync_every


class Scenario(_Part):
    """What is simulated."""

    nodes: Annotated[int, Field(ge=1)]
    ranks_per_node: Annotated[int, Field(ge=1)] = 1
    model_size: str
    """Parameters, such as 7B."""
    compute: ComputePart
    methods: Annotated[list[MethodPart], Field(min_length=1)]
    link: LinkPart = LinkPart()
    backend: Literal["gloo", "nccl"] = "gloo"
    """nccl is of GPUs, which send and compress beside their computing."""
    failures: FailurePart | None = None
    rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    memory_gb: Positive | None = None
    """Of a rank; None: enough."""
    bytes_per_parameter: Positive = 16
    """That training keeps: weights, gradients, the optimizer's state."""
    seed: int = 0
    lab: LabPart | None = None
    """How it runs in a lab; None: it does not."""

    @field_validator("model_size")
    @classmethod
    def _size(cls, text: str) -> str:
        transformer(parse_count(text))
        return text

    @property
    def work(self) -> Workload:
        """Of a rank."""
        shapes = transformer(parse_count(self.model_size))
        return Workload(shapes, self.compute.seconds, bytes_per_parameter=self.bytes_per_parameter)

    @property
    def cluster(self) -> Cluster:
        latency = parse_seconds(self.link.latency, "latency")
        return Cluster(
            self.nodes,
            self.ranks_per_node,
            Link.of_rate(parse_bandwidth(self.link.rate), latency),
            Link.of_rate(parse_bandwidth(self.link.local_rate), min(latency, 1e-5)),
            backend=self.backend,
            compresses_beside=self.backend == "nccl",
        )


def load_scenario(path: str | Path) -> Scenario:
    """Read and check a file.

    Raises:
        ConfigError: what :func:`~commkit.config.load_yaml` refuses, unknown fields, wrong values, or a model that does not
            fit a rank's memory.
    """
    scenario = validate(Scenario, load_yaml(path), str(path))
    needed = scenario.work.shapes.numel * scenario.bytes_per_parameter / 1e9
    if scenario.memory_gb is not None and needed > scenario.memory_gb:
        raise ConfigError(
            f"{path}: model_size={scenario.model_size} needs {needed:.1f} GB per rank at "
            f"bytes_per_parameter={scenario.bytes_per_parameter:g}, more than memory_gb={scenario.memory_gb:g}; "
            "shard the model (give the size of a shard), or give ranks more memory"
        )
    return scenario

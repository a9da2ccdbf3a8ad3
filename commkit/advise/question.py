"""What advice is asked for: a probe, and in what the cluster or the model that is meant differs from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..cost.cluster import TCP_GOODPUT, Cluster, Link
from ..cost.collectives import hops
from ..cost.predict import Workload
from ..cost.shapes import Shapes, transformer
from ..cost.units import parse_bandwidth, parse_bytes, parse_count, parse_seconds
from ..probe import Probe, ProbeError

_NEAR = Link(1e10, 1e-5)  # between ranks of a node that no probe saw
_SCALED = 0.2  # relative error of a step's time that is taken to grow with the model


@dataclass(frozen=True)
class Question:
    """
    Args:
        probe: of a cluster and a model.
        model_size: parameters, such as "7B"; None: the probe's model.
        nodes, ranks_per_node: None: the probe's.
        link: nominal rate of a node, such as "1gbit"; None: what the probe measured.
        latency: one way between nodes, such as "1ms"; None: what the probe measured.
        memory: of a rank, such as "80GB"; None: what the probe found.
        step_seconds: of compute; None: the probe's, in proportion to the model's size.
        shards: ranks of a node that hold one replica together.
        bytes_per_parameter: that training keeps: weights, gradients, the optimizer's state.
        utilisation: share of the time in which the model is to be computed, in (0, 1).
        longest: steps per round at most.
        schemes: to choose among; none: all that the probe timed.

    Raises:
        ValueError: a value that is impossible; the message names it.
        ProbeError: the probe lacks something that is not given either.
    """

    probe: Probe
    model_size: str | None = None
    nodes: int | None = None
    ranks_per_node: int | None = None
    link: str | None = None
    latency: str | None = None
    memory: str | None = None
    step_seconds: float | None = None
    shards: int = 1
    bytes_per_parameter: float = 16.0
    utilisation: float = 0.9
    longest: int = 1024
    schemes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, value in (("shards", self.shards), ("longest", self.longest)):
            if value < 1:
                raise ValueError(f"{name}={value} must be >= 1")
        if not 0 < self.utilisation < 1:
            raise ValueError(
                f"utilisation={self.utilisation:g} must be > 0 and < 1; use for example 0.9"
            )
        if self.step_seconds is not None and not self.step_seconds > 0:
            raise ValueError(f"step_seconds={self.step_seconds:g} must be > 0")
        if not self.bytes_per_parameter > 0:
            raise ValueError(
                f"bytes_per_parameter={self.bytes_per_parameter:g} must be > 0; use 16"
            )
        if self._per_node % self.shards:
            raise ValueError(
                f"shards={self.shards} must divide ranks_per_node={self._per_node}; a replica is sharded inside a node"
            )
        for one in self.schemes:
            self.probe.pace(one)
        self._check_memory()
        _ = self.cluster

    @property
    def candidates(self) -> Sequence[str]:
        return self.schemes or [one.scheme for one in self.probe.compression]

    @property
    def whole(self) -> Shapes:
        """The model, before it is sharded."""
        if self.model_size is None:
            return self.probe.model.shapes
        return transformer(parse_count(self.model_size))

    @property
    def memory_bytes(self) -> float:
        """Of a rank."""
        return self.probe.memory.share if self.memory is None else parse_bytes(self.memory)

    @property
    def work(self) -> Workload:
        """A rank's step."""
        found, own = self.probe.compute, self.probe.model.shapes.numel
        ratio = self.whole.numel / own
        seconds = found.step_s * ratio if self.step_seconds is None else self.step_seconds
        guessed = self.step_seconds is None and self.model_size is not None
        return Workload(
            self.whole.shard(self.shards) if self.shards > 1 else self.whole,
            seconds,
            min(1.0, found.backward_s / found.step_s),
            spread=found.spread + (_SCALED if guessed else 0.0),
            bytes_per_parameter=self.bytes_per_parameter,
        )

    @property
    def cluster(self) -> Cluster:
        """Of the ranks that reduce with each other: one of each replica."""
        found = self.probe.cluster
        link, local = self._link, self._local
        share = Link(link.bytes_per_second / self.shards, link.latency_s, link.spread)
        on_cpu = found.device == "cpu"
        busy = found.contention if on_cpu and found.contention >= 1 else 0.0
        return Cluster(
            found.nodes if self.nodes is None else self.nodes,
            self._per_node // self.shards,
            share,
            local,
            backend="nccl" if found.backend == "nccl" else "gloo",
            compresses_beside=not on_cpu,
            send_cpu_s_per_byte=busy * self.probe.send_cpu_s_per_byte,
            factors=self._factors,
        )

    @property
    def _per_node(self) -> int:
        given = self.ranks_per_node
        return self.probe.cluster.ranks_per_node if given is None else given

    @property
    def _link(self) -> Link:
        measured = self.probe.link
        latency = None if self.latency is None else parse_seconds(self.latency, "latency")
        alone = self.probe.cluster.nodes if self.nodes is None else self.nodes
        if self.link is None and measured is None and alone <= 1:
            return self._local
        if self.link is None and measured is None:
            raise ProbeError(
                "link: the probe saw no two nodes, so it has none; give one, such as --link 1gbit --latency 0.2ms"
            )
        if latency is None and measured is None:
            raise ProbeError(
                "latency: the probe saw no two nodes, so it has none; give --latency 0.2ms"
            )
        rate = measured.bytes_per_second if self.link is None and measured is not None else None
        if rate is None:
            assert self.link is not None
            rate = parse_bandwidth(self.link) / 8 * TCP_GOODPUT
        if latency is None and measured is not None:
            latency = measured.latency_s
        assert latency is not None
        return Link(rate, latency, measured.spread if self.link is None and measured else 0.0)

    @property
    def _local(self) -> Link:
        return _NEAR if self.probe.local is None else self.probe.local.link

    @property
    def _factors(self) -> dict[str, tuple[float, float]]:
        """How collectives did beside their algorithms. What they transfer depends on the link that is meant, so another
        one's is that of the algorithm."""
        found = self.probe.cluster
        link = self.probe.link or self.probe.local
        if link is None:
            return {}
        plain = Cluster(
            found.nodes,
            found.ranks_per_node,
            link.link,
            self._local,
            backend="nccl" if found.backend == "nccl" else "gloo",
        )
        factors: dict[str, tuple[float, float]] = {}
        for one in self.probe.collectives:
            ideal = hops(one.op, "", 1.0, plain)
            latency = ideal.messages * ideal.link.latency_s
            transfer = 1.0 / (one.bytes_per_second * ideal.transfer_s) if self.link is None else 1.0
            factors[one.op] = (one.latency_s / latency if latency else 1.0, transfer)
        return factors

    def _check_memory(self) -> None:
        needed = self.work.shapes.numel * self.bytes_per_parameter
        if needed > self.memory_bytes:
            raise ValueError(
                f"memory: a replica of {self.whole.numel:,} parameters needs {needed / 1e9:.1f} GB per rank at "
                f"bytes_per_parameter={self.bytes_per_parameter:g} and shards={self.shards}, more than "
                f"{self.memory_bytes / 1e9:.1f} GB; raise --shards, or give --memory of the machines that are meant"
            )

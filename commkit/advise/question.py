"""What advice is asked for: a probe, and in what the cluster or the model that is meant differs from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..cost.cluster import TCP_GOODPUT, Cluster, Link
from ..cost.collectives import hops
from ..cost.coordinated import SCHEMES as COORDINATED
from ..cost.pace import Pace
from ..cost.predict import Workload
from ..cost.shapes import Shapes, transformer
from ..cost.sharded import FSDP, units_of
from ..cost.units import parse_bandwidth, parse_bytes, parse_count, parse_seconds
from ..probe import Probe, ProbeError

_NEAR = Link(1e10, 1e-5)  # between ranks of a node that no probe saw
UNTIMED = (FSDP, *COORDINATED)  # schemes that compute nothing of their own
DEFAULTS = (FSDP, "backup", "gradient_coding")  # of these, what is asked for if nothing is
# Registered schemes without a row, and why.
LEFT_OUT: Mapping[str, str] = {
    "hsdp": "it is a scheme between replicas: ask with --shards",
    "three_level": "its tiers are those of a mesh, which a probe does not know",
    "async_local_sgd": "what it gains depends on workers' speeds: commkit simulate",
    "dbw": "how many it awaits depends on gradients: see backup",
}
_SCALED = 0.2  # relative error of a step's time that is taken to grow with the model


@dataclass(frozen=True, kw_only=True)
class Options:
    """In what the cluster and the model that are meant differ from a probe's, and what is wanted of them."""

    model_size: str | None = None
    """Parameters, such as 7B; the probe's model if not given."""
    nodes: int | None = None
    """The probe's if not given."""
    ranks_per_node: int | None = None
    """The probe's if not given."""
    link: str | None = None
    """Nominal rate of a node, such as 1gbit; what was measured if not given."""
    latency: str | None = None
    """One way between nodes, such as 1ms; what was measured if not given."""
    memory: str | None = None
    """Of a rank, such as 80GB; what was found if not given."""
    step_seconds: float | None = None
    """Of compute; what was measured, in proportion to the model's size, if not given."""
    shards: int = 1
    """Ranks of a node that hold one replica together. Schemes for sharded models take all ranks for one in any case."""
    bytes_per_parameter: float = 16.0
    """That training keeps: weights, gradients, the optimizer's state."""
    utilisation: float = 0.92
    """Share of the time in which the model is to be computed, above 0 and below 1. The default leaves a step within 10 % of
    one that sends nothing."""
    longest: int = 1024
    """Steps per round of local updates at most."""


@dataclass(frozen=True)
class Question(Options):
    """
    Args:
        probe: of a cluster and a model.
        schemes: to choose among; none: all that the probe timed, and some that need no timing.

    Raises:
        ValueError: a value that is impossible; the message names it.
        ProbeError: the probe lacks something that is not given either.
    """

    probe: Probe
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
            if one in LEFT_OUT:
                raise ValueError(f"schemes: {one} is not advised: {LEFT_OUT[one]}")
            self.pace(one)
        _ = self.memory_bytes, self.work, self.cluster

    @property
    def candidates(self) -> Sequence[str]:
        timed = [one.scheme for one in self.probe.compression]
        return self.schemes or [*timed, *DEFAULTS]

    def pace(self, scheme: str) -> Pace:
        """Nothing is computed where nothing was to be timed."""
        return Pace(0.0, 0.0) if scheme in UNTIMED else self.probe.pace(scheme)

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
        """A rank's step on a replica, or on its shard of one."""
        whole = self.whole_work
        if self.shards == 1:
            return whole
        return replace(whole, shapes=whole.shapes.shard(self.shards), units=units_of(whole.shapes))

    @property
    def whole_work(self) -> Workload:
        """A rank's step where all ranks share one replica."""
        found, own = self.probe.compute, self.probe.model.shapes.numel
        ratio = self.whole.numel / own
        seconds = found.step_s * ratio if self.step_seconds is None else self.step_seconds
        guessed = self.step_seconds is None and self.model_size is not None
        return Workload(
            self.whole,
            seconds,
            min(1.0, found.backward_s / found.step_s),
            spread=found.spread + (_SCALED if guessed else 0.0),
            bytes_per_parameter=self.bytes_per_parameter,
        )

    @property
    def cluster(self) -> Cluster:
        """Of the ranks that reduce with each other: one of each replica."""
        whole, link = self.whole_cluster, self._link
        share = Link(link.bytes_per_second / self.shards, link.latency_s, link.spread)
        return replace(whole, ranks_per_node=self._per_node // self.shards, link=share)

    @property
    def whole_cluster(self) -> Cluster:
        """Of all ranks."""
        found = self.probe.cluster
        on_cpu = found.device == "cpu"
        busy = found.contention if on_cpu and found.contention >= 1 else 0.0
        return Cluster(
            found.nodes if self.nodes is None else self.nodes,
            self._per_node,
            self._link,
            self._local,
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

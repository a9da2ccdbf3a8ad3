"""The machines that a prediction is for: nodes, the ranks on each, and the links between and inside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# Of a full 1514-byte Ethernet frame, what TCP over IPv4 with time stamps leaves to its user.
TCP_GOODPUT = 1448 / 1514


@dataclass(frozen=True)
class Link:
    """An alpha-beta link: a message of n bytes takes ``latency_s + n / bytes_per_second``.

    Args:
        bytes_per_second: that a program gets, headers already off.
        latency_s: one way, of a small message, the stack's own work included.
        spread: relative standard deviation of repeated measurements; 0 if unknown.
    """

    bytes_per_second: float
    latency_s: float
    spread: float = 0.0

    def __post_init__(self) -> None:
        if not self.bytes_per_second > 0:
            raise ValueError(f"bytes_per_second={self.bytes_per_second} must be > 0")
        if not self.latency_s >= 0:
            raise ValueError(f"latency_s={self.latency_s} must be >= 0")

    @classmethod
    def of_rate(cls, bits_per_second: float, latency_s: float) -> Link:
        """A link of a nominal rate under TCP."""
        return cls(bits_per_second / 8 * TCP_GOODPUT, latency_s)


@dataclass(frozen=True)
class Cluster:
    """
    Args:
        nodes: hosts, >= 1.
        ranks_per_node: processes on each, >= 1. They share the node's ``link``.
        link: of a node to the others, each way.
        local: between two ranks of one node; each rank has its own.
        backend: whose algorithms count: "gloo" scatters with an all-reduce's traffic.
        compresses_beside: compression runs beside the model's own work (a GPU's side stream). False: it takes the
            processors that the model computes on, as on CPUs.
        send_cpu_s_per_byte: seconds of compute that a byte takes away which a rank sends; 0 where processors are spare.
        factors: by collective, how many times its algorithm's latency and transfer it takes in practice; 1 and 1 of
            those that are not named.

    Raises:
        ValueError: a count below 1.
    """

    nodes: int
    ranks_per_node: int
    link: Link
    local: Link
    backend: Literal["gloo", "nccl"] = "gloo"
    compresses_beside: bool = False
    send_cpu_s_per_byte: float = 0.0
    factors: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("nodes", self.nodes), ("ranks_per_node", self.ranks_per_node)):
            if value < 1:
                raise ValueError(f"{name}={value} must be >= 1; a cluster has at least one of them")

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

"""Step time, bytes and memory of a scheme on a cluster: compute, plus what of the communication backward does not hide."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .cluster import Cluster
from .collectives import Hops, hops
from .pace import Pace
from .shapes import Shapes
from .traffic import Law, Sent

FIRST_BUCKET, BUCKET = 1024**2, 25 * 1024**2  # bytes: DDP's defaults
ELEMENT = 4  # bytes of a gradient
MODEL_ERROR = 0.15  # of communication: what the model is allowed to be off; benchmarks/predicted.py says where it is


@dataclass(frozen=True)
class Workload:
    """One replica's work in a step.

    Args:
        shapes: of what a rank reduces.
        compute_s: forward, backward and optimizer, without communication.
        backward_share: of ``compute_s``: where gradients come; a third of the work is forward.
        spread: relative standard deviation of ``compute_s``.
        bytes_per_parameter: that training keeps without any scheme: float32 weights, gradients and Adam's two.
        units: equal parts in which gradients come, as those of ``fully_shard``; 0: in DDP's buckets.

    Raises:
        ValueError: no parameters, no time, or a share outside (0, 1].
    """

    shapes: Shapes
    compute_s: float
    backward_share: float = 2 / 3
    spread: float = 0.05
    bytes_per_parameter: float = 16.0
    units: int = 0

    def __post_init__(self) -> None:
        if self.shapes.numel < 1:
            raise ValueError("shapes: the model has no parameters that are trained")
        if not self.compute_s > 0:
            raise ValueError(f"compute_s={self.compute_s} must be > 0; give a step's seconds alone")
        if not 0 < self.backward_share <= 1:
            raise ValueError(f"backward_share={self.backward_share} must be in (0, 1]")


@dataclass(frozen=True)
class Prediction:
    """
    Args:
        scheme: its name.
        sync_every: steps per synchronisation; 1 of schemes for every step.
        step_s: mean seconds of a step, synchronisation shared among its steps.
        low_s, high_s: error bar of ``step_s``.
        compute_s: of that, the model's own work, each batch evaluated once.
        again_s: of ``step_s``, batches that the scheme evaluates again.
        exposed_s: the rest.
        sync_s: of one synchronisation, hidden or not, compression included.
        compression_s: of that, arithmetic.
        wire_bytes: per step and rank.
        link_bytes: per step that leave a node one way.
        peak_bytes_per_s: most that a node's link would have to carry for nothing to be exposed.
        memory_bytes: per rank.
    """

    scheme: str
    sync_every: int
    step_s: float
    low_s: float
    high_s: float
    compute_s: float
    exposed_s: float
    sync_s: float
    compression_s: float
    wire_bytes: float
    link_bytes: float
    peak_bytes_per_s: float
    memory_bytes: float
    again_s: float = 0.0

    @property
    def utilisation(self) -> float:
        """Share of a step that the model's own work takes."""
        return self.compute_s / self.step_s


@dataclass(frozen=True)
class Round:
    """How a method with local updates spreads a round.

    Args:
        sync_every: steps.
        parts: share of the model and steps of delay of each synchronisation in a round.
    """

    sync_every: int
    parts: Sequence[tuple[float, int]]


def predict(
    law: Law, pace: Pace, work: Workload, cluster: Cluster, plan: Round | None = None
) -> Prediction:
    """
    Args:
        law: what the scheme sends.
        pace: how fast it computes.
        work: one replica's step.
        cluster: where.
        plan: of a law per round; None for one per step.

    Raises:
        ValueError: a law per round without a plan, or the other way round.
    """
    if law.per_round != (plan is not None):
        raise ValueError(
            f"scheme {law.name!r}: a plan of the round goes with local updates, and only there"
        )
    sent = law.sent(work.shapes, cluster.world_size)
    costs = [(one, hops(one.op, one.scope, one.payload, cluster)) for one in sent]
    every = 1 if plan is None else plan.sync_every
    arithmetic = pace.seconds(work.shapes.numel, cluster.world_size, every)
    sending = cluster.send_cpu_s_per_byte * sum(h.wire_bytes for _, h in costs)
    again = (law.evaluations - 1) * work.compute_s
    busy = replace(work, compute_s=work.compute_s + again)

    def step(slower: float) -> float:
        """Seconds, with transfers that take so many times what they should."""
        if plan is None:
            return _every_step(law, busy, cluster, costs, arithmetic, sending, slower)
        return _local(busy, cluster, plan, costs, arithmetic, sending, slower)

    middle = step(1.0)
    off = MODEL_ERROR + cluster.link.spread
    link_bytes = sum(h.link_bytes for _, h in costs if h.link is cluster.link)
    parts = 1 if plan is None else len(plan.parts)
    window = busy.compute_s * (work.backward_share if plan is None else 1)
    if plan is not None:
        window *= max(1, max(delay for _, delay in plan.parts))
    return Prediction(
        scheme=law.name,
        sync_every=every,
        step_s=middle,
        low_s=step(1 - off) - work.spread * busy.compute_s,
        high_s=step(1 + off) + work.spread * busy.compute_s,
        compute_s=work.compute_s,
        again_s=again,
        exposed_s=middle - busy.compute_s,
        sync_s=_seconds(costs) + arithmetic,
        compression_s=arithmetic,
        wire_bytes=sum(h.wire_bytes for _, h in costs) / every,
        link_bytes=link_bytes / every,
        peak_bytes_per_s=link_bytes / parts / window,
        memory_bytes=work.shapes.numel * work.bytes_per_parameter
        + law.state_bytes(work.shapes, cluster.world_size),
    )


def _seconds(costs: Sequence[tuple[Sent, Hops]], calls: float = 1.0) -> float:
    """Of all collectives, each split over so many times as many calls."""
    return sum(h.transfer_s + calls * s.count * h.messages * h.link.latency_s for s, h in costs)


def _every_step(
    law: Law,
    work: Workload,
    cluster: Cluster,
    costs: Sequence[tuple[Sent, Hops]],
    arithmetic: float,
    sending: float,
    slower: float,
) -> float:
    """Buckets become ready while backward runs, and are reduced one after another."""
    shares = [1.0] if law.whole_step else _shares(work)
    transfer = slower * sum(h.transfer_s for _, h in costs)
    latency = slower * (_seconds(costs) - sum(h.transfer_s for _, h in costs))
    backward = work.compute_s * work.backward_share
    ready, done = work.compute_s - backward, 0.0
    for share in shares:
        ready += share * backward
        done = max(ready, done) + share * (transfer + arithmetic) + latency
        ready += share * sending  # what follows of backward waits for the processor
        if not cluster.compresses_beside:
            ready += share * arithmetic
    return max(done, work.compute_s + sending)


def _shares(work: Workload) -> list[float]:
    if work.units:
        return [1 / work.units] * work.units
    return bucket_shares(work.shapes.numel * ELEMENT)


def bucket_shares(size: float) -> list[float]:
    """DDP's buckets in the order in which backward fills them, as shares of the gradients' bytes."""
    first = min(FIRST_BUCKET, size)
    number = math.ceil((size - first) / BUCKET)
    rest = [min(BUCKET, size - first - i * BUCKET) / size for i in range(number)]
    return [first / size, *rest]


def _local(
    work: Workload,
    cluster: Cluster,
    plan: Round,
    costs: Sequence[tuple[Sent, Hops]],
    arithmetic: float,
    sending: float,
    slower: float,
) -> float:
    """Each part of a round hides behind the steps of its delay; all together take at least their transfers' time."""
    seconds = slower * _seconds(costs)
    blocking = all(delay == 0 for _, delay in plan.parts)  # nobody computes meanwhile
    alone = work.compute_s * plan.sync_every + (0.0 if blocking else sending)
    computing = alone if cluster.compresses_beside else alone + arithmetic
    beside = seconds + (arithmetic if cluster.compresses_beside else 0.0)
    exposed = sum(max(0.0, share * beside - delay * work.compute_s) for share, delay in plan.parts)
    return max(computing + exposed, seconds) / plan.sync_every


def smallest_sync_every(
    target: float, predicted: Callable[[int], Prediction | None], longest: int = 8192
) -> Prediction | None:
    """The shortest round, in powers of two, that computes for a share ``target`` of its time; None if none does.

    Args:
        target: in (0, 1).
        predicted: for so many steps per round; None where the method has no such round.
        longest: that is tried.

    Raises:
        ValueError: a target that no round can reach.
    """
    if not 0 < target < 1:
        raise ValueError(f"utilisation={target} must be > 0 and < 1; use for example 0.9")
    every = 1
    while every <= longest:
        found = predicted(every)
        if found is not None and found.utilisation >= target:
            return found
        every *= 2
    return None

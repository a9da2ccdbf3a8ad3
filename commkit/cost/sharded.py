"""FSDP on a cluster: weights gathered for forward and again for backward, gradients scattered, by FSDP itself or in a scheme's
codes. What these send is learnt by running them for the ranks that are meant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..schemes import make_scheme
from ..sharded import ShardedScheme
from ..sim.mirror import Call, MirrorComm
from .cluster import Cluster
from .collectives import hops
from .pace import Pace
from .predict import ELEMENT, Prediction, Workload
from .run import GATHERS, MEASURED_WITH, run_sharded
from .shapes import Shapes

FSDP = "fsdp"  # stands for FSDP itself, in full precision, as "ddp" does for DDP
MODEL_ERROR = 0.3  # of communication: less is measured of sharded models than of replicas
_PER_UNIT = 4  # matrices that ``fully_shard`` is called on together: a transformer's block
_SIDE = 1024


@dataclass(frozen=True)
class Flow:
    """What a rank sends for a model.

    Args:
        gather: collectives of one gather of its weights.
        scatter: those of its gradients.
        numel: elements of the model that these are of; they grow with it.
    """

    gather: tuple[Call, ...]
    scatter: tuple[Call, ...]
    numel: int

    def seconds(self, calls: Sequence[Call], numel: int, units: int, cluster: Cluster) -> float:
        """For a model of ``numel`` elements in so many units, each with collectives of its own."""
        costs = [hops(c.op, c.scope, c.payload * numel / self.numel, cluster) for c in calls]
        return sum(h.transfer_s + units * h.messages * h.link.latency_s for h in costs)


def flow_of(made: ShardedScheme, world_size: int) -> Flow:
    """Learnt from the scheme's own code; FSDP's where it has none."""
    side = world_size * -(-_SIDE // world_size)
    weights = dataclasses.replace(made, gradients=None, between=None, feedback="none")
    gradients = dataclasses.replace(made, weights=None)
    gather, scatter = (
        run_sharded(one, side, 1, MirrorComm(world_size)).calls for one in (weights, gradients)
    )
    size = ELEMENT * side**2
    return Flow(
        gather or (Call("all_gather", "", size // world_size, world_size),),
        scatter or (Call("reduce_scatter", "", size, world_size),),
        side**2,
    )


def units_of(shapes: Shapes) -> int:
    """Parts of a model on which ``fully_shard`` is called."""
    return max(1, shapes.matrices // _PER_UNIT)


@lru_cache(maxsize=256)
def is_sharded(name: str) -> bool:
    """Whether it is a scheme for sharded models that can be predicted, or :data:`FSDP`."""
    if name == FSDP:
        return True
    try:
        made = make_scheme(name, MEASURED_WITH.get(name))
    except ValueError:  # unknown, or nothing without settings
        return False
    return isinstance(made, ShardedScheme)


@lru_cache(maxsize=64)
def scheme_flow(name: str, world_size: int, ranks_per_node: int) -> Flow:
    """Of a registered scheme, or of :data:`FSDP`.

    Raises:
        ValueError: it is none for sharded models.
    """
    made = ShardedScheme() if name == FSDP else make_scheme(name)
    if not isinstance(made, ShardedScheme):
        raise ValueError(f"scheme {name!r} is not for sharded models; qsdp and zeropp are")
    if made.between is not None:
        made = dataclasses.replace(made, local_size=ranks_per_node)
    return flow_of(made, world_size)


def predict_sharded(name: str, pace: Pace, work: Workload, cluster: Cluster) -> Prediction:
    """
    Args:
        name: of a scheme for sharded models, or :data:`FSDP`.
        pace: how fast it computes.
        work: a rank's step on the whole model, which all ranks share.
        cluster: of these ranks.

    Raises:
        ValueError: a scheme of another kind.
    """
    world, shapes = cluster.world_size, work.shapes
    units = units_of(shapes)
    # Norms and biases go in full precision, in the messages of their unit.
    flows = (
        (scheme_flow(name, world, cluster.ranks_per_node), shapes.matrix_numel, units),
        (scheme_flow(FSDP, world, cluster.ranks_per_node), shapes.vector_numel, 0),
    )
    gather = sum(f.seconds(f.gather, numel, calls, cluster) for f, numel, calls in flows)
    scatter = sum(f.seconds(f.scatter, numel, calls, cluster) for f, numel, calls in flows)
    costs = [
        hops(c.op, c.scope, c.payload * numel / flow.numel, cluster)
        for flow, numel, _ in flows
        for c in (*flow.gather * GATHERS, *flow.scatter)
    ]
    arithmetic = pace.seconds(shapes.numel, world)
    sending = cluster.send_cpu_s_per_byte * sum(h.wire_bytes for h in costs)

    def step(slower: float) -> float:
        return _step(work, cluster, slower * gather, slower * scatter, arithmetic, sending, units)

    off = MODEL_ERROR + cluster.link.spread
    middle, link_bytes = step(1.0), sum(h.link_bytes for h in costs if h.link is cluster.link)
    unit_bytes = ELEMENT * shapes.numel / units
    return Prediction(
        scheme=name,
        sync_every=1,
        step_s=middle,
        low_s=step(1 - off) - work.spread * work.compute_s,
        high_s=step(1 + off) + work.spread * work.compute_s,
        compute_s=work.compute_s,
        exposed_s=middle - work.compute_s,
        sync_s=GATHERS * gather + scatter + arithmetic,
        compression_s=arithmetic,
        wire_bytes=sum(h.wire_bytes for h in costs),
        link_bytes=link_bytes,
        peak_bytes_per_s=link_bytes / work.compute_s,
        # Weights and gradients of one unit are whole, and the next unit's weights on their way.
        memory_bytes=shapes.numel * work.bytes_per_parameter / world + 3 * unit_bytes,
    )


def _step(
    work: Workload,
    cluster: Cluster,
    gather: float,
    scatter: float,
    arithmetic: float,
    sending: float,
    units: int,
) -> float:
    """On a GPU a unit's transfers hide behind other units' computing; on CPUs each is awaited where it is called."""
    if not cluster.compresses_beside:
        return work.compute_s + arithmetic + GATHERS * gather + scatter
    backward = work.compute_s * work.backward_share
    each = arithmetic / (GATHERS + 1)
    first, last = (gather + each) / units, (scatter + each) / units
    ahead = first + max(work.compute_s - backward, gather + each - first)
    back = first + max(backward + sending, gather + each - first + scatter + each - last) + last
    return ahead + back

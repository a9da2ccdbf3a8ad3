"""Full precision inside a node, any other aggregator between nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2s

import torch
from torch import Tensor

from ..feedback import NoFeedback, check_contraction
from ..metrics import profiler_range
from ..registry import register
from ..types import (
    NODE,
    SHARD,
    WHOLE,
    Aggregated,
    Aggregator,
    Comm,
    Feedback,
    NonFiniteError,
    Preparable,
    StateDict,
    TensorCtx,
    parameter_of,
    section,
)
from .health import require_finite, require_unmarked
from .mean import mean_of
from .message import Layout
from .nodes import Nodes, Placement, check_nodes, placement
from .residuals import Outgoing, aggregate, compensate, update_feedback

_AGGREGATOR = "aggregator"


@register("aggregator", "hierarchical")
@dataclass(slots=True)
class Hierarchical:
    """The three phases of a hierarchical all-reduce (Jia et al. 2018) with a compressing one in the middle.
    Each rank of a node serves some of the parameters: it averages them over its node in full precision, puts
    the node's mean through ``feedback`` and ``aggregator`` over the ranks that serve them in the other nodes,
    and hands the result to its node.

    The scheme between nodes sees one participant per node: its bytes leave a node once, not once for each
    rank, its residual is the node's and kept by one rank, 1/L of the memory on each of L ranks. Two
    collectives inside the node and those of ``aggregator``; inside, each rank sends 2(L-1)/L times the
    gradient in full precision. What a rank puts in is never lost in its own view (``sent`` is the input).

    With one rank per node this is ``feedback`` and ``aggregator`` alone; on a single node of several ranks
    the plain mean, as no link is slow (residuals of a run on more nodes are sent in its first step).

    Which rank serves a parameter follows from its name alone, so that residuals stay where they are whatever
    DDP's buckets, or which layers are frozen; ranks are loaded evenly on average, for many tensors of a size.
    Parameters are not cut: low-rank schemes need whole matrices.

    Args:
        aggregator: the scheme between nodes.
        feedback: its feedback, of the node means. Here and not around this aggregator.
        local_size: ranks per node, of consecutive ranks; None: the environment's LOCAL_WORLD_SIZE, as
            torchrun and the other launchers set it. What counts as a node is up to you: the ranks of a
            rack or of a site, where the slow link lies behind those.
        nodes: the ranks of each node instead, from :func:`commkit.aggregators.nodes_of_mesh`.

    Raises:
        ValueError: local_size < 1, uneven nodes, or both given; at attach or the first reduction, on every
            rank: nodes that do not fit the ranks; at the first reduction: state that was saved with other
            nodes on the same number of ranks.
    """

    aggregator: Aggregator
    feedback: Feedback = field(default_factory=NoFeedback)
    local_size: int | None = None
    nodes: Nodes | None = None
    # Loaded state of parameters that this rank may not serve: sorted out when the ranks are known.
    _loaded: StateDict | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for part in (self.aggregator, getattr(self.aggregator, "compressor", None)):
            check_contraction(self.feedback, part, "feedback")
        if self.nodes is not None:
            if self.local_size is not None:
                raise ValueError(f"local_size={self.local_size} beside nodes; give one of them")
            self.nodes = check_nodes(self.nodes)
        if self.local_size is not None and self.local_size < 1:
            raise ValueError(
                f"local_size={self.local_size} must be >= 1; use the number of ranks of one node"
            )

    def prepare(self, ctxs: Sequence[TensorCtx], comm: Comm) -> None:
        """Make the groups now and not in the first step."""
        place = placement(comm, self.local_size, self.nodes)
        if isinstance(self.aggregator, Preparable):
            self.aggregator.prepare(ctxs, place.inter)

    def aggregate(
        self, xs: Sequence[Tensor], ctxs: Sequence[TensorCtx], comm: Comm
    ) -> list[Aggregated]:
        place = placement(comm, self.local_size, self.nodes)
        self._take_loaded(place)
        size = place.intra.world_size
        servers = [server_of(ctx.key, place) for ctx in ctxs]
        served = [[i for i, server in enumerate(servers) if server == r] for r in range(size)]
        mine = served[place.intra.rank]
        with profiler_range("inside_node"):
            means = _node_means(xs, served, place.intra)
        failure: NonFiniteError | None = None
        contributors = place.inter.world_size
        if mine:
            try:
                with profiler_range("between_nodes"):
                    means, contributors = self._between_nodes(means, [ctxs[i] for i in mine], place)
            except NonFiniteError as error:
                failure = error
        with profiler_range("inside_node"):
            results, nodes = _share(means, xs, served, failure, contributors, place.intra)
        return [Aggregated(results[i], x, nodes * size) for i, x in enumerate(xs)]

    def _between_nodes(
        self, means: list[Tensor], ctxs: list[TensorCtx], place: Placement
    ) -> tuple[list[Tensor], int]:
        """What becomes of the node's means between nodes, and how many nodes are in it.

        Raises:
            NonFiniteError: on all ranks of ``place.inter``.
        """
        # No rank of the node had a gradient: nobody may use the result either, so the residual waits.
        idle = [not bool(mean.any()) for mean in means]
        alone = place.inter.world_size == 1 and place.intra.world_size > 1
        to = None if alone else self.aggregator
        outgoing = [
            Outgoing(mean) if waits else compensate(self.feedback, to, mean, ctx)
            for mean, ctx, waits in zip(means, ctxs, idle, strict=True)
        ]
        if alone:
            deltas = [each.delta for each in outgoing]
            require_finite(deltas)
            outcomes = [Aggregated(delta, delta, 1) for delta in deltas]
        else:
            outcomes = aggregate(self.aggregator, outgoing, ctxs, place.inter)
        results = [
            self.feedback.deliver(outcome.mean, ctx.key)
            for outcome, ctx in zip(outcomes, ctxs, strict=True)
        ]
        used = [i for i, waits in enumerate(idle) if not waits]
        update_feedback(
            self.feedback,
            [outgoing[i] for i in used],
            [outcomes[i] for i in used],
            [ctxs[i].key for i in used],
        )
        return results, min(outcome.num_contributors for outcome in outcomes)

    def _take_loaded(self, place: Placement) -> None:
        """Keep what this rank serves of a loaded state.

        Raises:
            ValueError: the state was saved with other nodes; this rank alone has residuals of a parameter
                that it does not serve, and they would be lost.
        """
        if self._loaded is None:
            return
        served: StateDict = {}
        rest: StateDict = {}
        for key, value in self._loaded.items():
            mine = server_of(key, place) == place.intra.rank
            (served if mine else rest)[key] = value
        stray = [key for key in rest if key.startswith(f"{NODE}/") or f"/{SHARD}/" in key]
        if stray:
            raise ValueError(
                f"residual {stray[0]!r} was saved with other nodes than those of {place.intra.world_size} "
                "ranks of now; resume with the local_size that saved it, or start without its state"
            )
        self.feedback.load_state_dict(section(served, WHOLE) | section(served, NODE))
        self.aggregator.load_state_dict(section(served, _AGGREGATOR))
        self._loaded = None

    def commit(self, ok: bool) -> None:
        self.feedback.commit(ok)
        self.aggregator.commit(ok)

    def state_dict(self) -> StateDict:
        if self._loaded is not None:
            return dict(self._loaded)
        state = {f"{NODE}/{key}": value for key, value in self.feedback.state_dict().items()}
        for key, value in self.aggregator.state_dict().items():
            state[f"{_AGGREGATOR}/{key}"] = value
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._loaded = {key: value.detach().clone() for key, value in state.items()}


def server_of(key: str, place: Placement) -> int:
    """Local index of the rank that serves a parameter, from its name or a state key that ends in it.

    The number of all ranks is hashed too, so that a hierarchy inside a hierarchy deals differently.
    """
    ranks = place.intra.world_size * place.inter.world_size
    digest = blake2s(f"{ranks}/{parameter_of(key)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % place.intra.world_size


def _node_means(xs: Sequence[Tensor], served: Sequence[Sequence[int]], intra: Comm) -> list[Tensor]:
    """The node's mean of each tensor that this rank serves, added up in rank order."""
    mine = served[intra.rank]
    if intra.world_size == 1:
        return [xs[i] for i in mine]
    healthy = torch.zeros((), device=xs[0].device)  # inf and NaN speak for themselves here
    parts = [[(xs[i],) for i in of_rank] for of_rank in served]
    layouts = [Layout(of_rank) for of_rank in parts]
    messages = [l.encode(of_rank, healthy) for l, of_rank in zip(layouts, parts, strict=True)]
    received = intra.all_to_all(
        torch.cat(messages),
        [message.numel() for message in messages],
        [messages[intra.rank].numel()] * intra.world_size,
    )
    shares = [layouts[intra.rank].decode(message) for message in received]
    return [mean_of([part for (part,) in of_ranks]) for of_ranks in zip(*shares, strict=True)]


def _share(
    means: Sequence[Tensor],
    xs: Sequence[Tensor],
    served: Sequence[Sequence[int]],
    failure: NonFiniteError | None,
    contributors: int,
    intra: Comm,
) -> tuple[dict[int, Tensor], int]:
    """Everybody's results by place, and the fewest nodes in one of them.

    Servers of the same parameters succeed or fail together, and each node has one of them: what a node's
    ranks tell each other here is therefore known to all ranks of all nodes.

    Raises:
        NonFiniteError: on every rank of every node, if any rank has a ``failure``.
    """
    mine = served[intra.rank]
    if intra.world_size == 1:
        if failure is not None:
            raise failure
        return dict(zip(mine, means, strict=True)), contributors
    device = xs[0].device
    health = torch.full((), torch.nan if failure is not None else 0.0, device=device)
    count = torch.tensor([contributors], dtype=torch.int32, device=device)
    layouts = [Layout([*((xs[i],) for i in of_rank), (count,)]) for of_rank in served]
    answer = layouts[intra.rank].encode([(mean,) for mean in means] + [(count,)], health)
    answers = intra.all_to_all(
        answer.repeat(intra.world_size),
        [answer.numel()] * intra.world_size,
        [layout.size for layout in layouts],
    )
    require_unmarked(layout.mark(message) for layout, message in zip(layouts, answers, strict=True))
    results: dict[int, Tensor] = {}
    for of_rank, message, layout in zip(served, answers, layouts, strict=True):
        *parts, (their_count,) = layout.decode(message)
        results.update((i, part) for i, (part,) in zip(of_rank, parts, strict=True))
        contributors = min(contributors, int(their_count))
    return results, contributors

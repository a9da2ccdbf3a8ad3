"""What a scheme does where FSDP2 shards the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from ..aggregators.nodes import Nodes, placement
from ..policy import Policy
from ..reducer import Reducer
from ..types import Comm, Compressor
from .exchange import Exchange, OneHop, OneHopWithFeedback, TwoHops
from .message import RowCodec


@dataclass(frozen=True)
class ShardedScheme:
    """Parts for :func:`commkit.attach`, which puts them on a model that ``fully_shard`` was called on.

    Args:
        weights: code of the gathered weights; None leaves FSDP's all-gather alone.
        gradients: code of the scattered gradients; None leaves FSDP's reduce-scatter alone.
        between: code of node means where gradients go node by node (ZeRO++); None: they go in one hop.
        feedback: keep what ``gradients`` leaves unsent: of whole gradients, as large as the model on every rank.
        policy: which parameters are compressed, by their whole size.
        reducer: for the replicate axis of a mesh; None: there is none.
        local_size: ranks per node, where ``between`` is given; None: the environment's LOCAL_WORLD_SIZE.
        nodes: the ranks of each node instead.
        seed: base of shared randomness.

    Raises:
        ValueError: codes whose payloads have no fixed size, or ``between`` or ``feedback`` without ``gradients``, or
            both.
    """

    weights: Compressor | None = None
    gradients: Compressor | None = None
    between: Compressor | None = None
    feedback: Literal["none", "error_feedback"] = "none"
    policy: Policy = field(default_factory=lambda: Policy(min_ndim=2))
    reducer: Reducer | None = None
    local_size: int | None = None
    nodes: Nodes | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("weights", "gradients", "between"):
            code = getattr(self, name)
            if code is not None and not code.fixed_size:
                raise TypeError(
                    f"{name}={type(code).__name__} has payloads whose size depends on the data; use one with "
                    "fixed_size=True"
                )
        if self.feedback not in ("none", "error_feedback"):
            raise ValueError(f"feedback={self.feedback!r} must be 'none' or 'error_feedback'")
        for name, given in (
            ("between", self.between is not None),
            ("feedback", self.feedback != "none"),
        ):
            if given and self.gradients is None:
                raise ValueError(
                    f"{name} has no effect while gradients go in full precision; give gradients a code too"
                )
        if self.between is not None and self.feedback != "none":
            raise ValueError(
                "feedback='error_feedback' beside between: two hops keep no residuals; use one hop (qsdp), or "
                "stochastic rounding without feedback"
            )
        if (
            self.feedback != "none"
            and self.gradients is not None
            and not self.gradients.allows_error_feedback
        ):
            raise TypeError(
                f"error feedback diverges on {type(self.gradients).__name__} as it is set; use rounding='nearest', or no feedback"
            )

    def gathering(self, shapes: dict[str, torch.Size]) -> RowCodec | None:
        """How weights are gathered; ``shapes`` are of the whole parameters."""
        return None if self.weights is None else self._codec(self.weights, shapes)

    def scattering(self, shapes: dict[str, torch.Size], comm: Comm) -> Exchange | None:
        """How gradients are scattered over ``comm``. Collective where they go node by node.

        Raises:
            ValueError: on every rank, nodes that do not fit the ranks.
        """
        if self.gradients is None:
            return None
        codec = self._codec(self.gradients, shapes)
        if self.between is not None:
            place = placement(comm, self.local_size, self.nodes)
            ranks = place.inter.all_gather_object(place.intra.all_gather_object(comm.rank))
            return TwoHops(codec, self._codec(self.between, shapes), place, ranks)
        return OneHop(codec, comm) if self.feedback == "none" else OneHopWithFeedback(codec, comm)

    def _codec(self, code: Compressor, shapes: dict[str, torch.Size]) -> RowCodec:
        return RowCodec(code, self.policy, shapes, self.seed)

"""No communication at all: the bound that no scheme can beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..registry import register
from ..types import Aggregated, Comm, TensorCtx
from .stateless import Stateless


@register("aggregator", "noop")
@dataclass(slots=True)
class Noop(Stateless):
    """Hands every rank its own gradient back. Replicas drift apart: for measuring headroom only."""

    def aggregate(
        self, xs: Sequence[Tensor], ctxs: Sequence[TensorCtx], comm: Comm
    ) -> list[Aggregated]:
        return [Aggregated(x, x, 1) for x in xs]

"""Methods with local updates as schemes: everything but the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from ..reducer import Reducer
from .base import OuterSync
from .joining import Ranks


@dataclass(frozen=True)
class OuterScheme:
    """A method still without a model: ``scheme(model, optimizer)`` builds it, a ``with`` block starts it.

    Args:
        method: the class.
        knobs: its fields of the scheme.
        seed: base of shared randomness.
    """

    method: type[OuterSync]
    knobs: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __call__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        process_group: Ranks = None,
        master_weights: Mapping[str, Tensor] | None = None,
    ) -> OuterSync:
        """Build the method; the arguments are those of :class:`OuterSync`."""
        knobs = dict(self.knobs)
        if isinstance(knobs.get("reducer"), Reducer):
            knobs["reducer"] = copy.deepcopy(knobs["reducer"])  # whose state is one model's
        made = self.method(
            model,
            optimizer,
            process_group=process_group,
            master_weights=master_weights,
            **knobs,
        )
        made.reducer.seed = self.seed
        return made

    def checked(self, layers: int = 1) -> OuterScheme:
        """Raise now what is wrong with the knobs, not when a model of so many layers comes."""
        with torch.random.fork_rng(devices=[]):  # weights are drawn, from nobody's generator
            model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(layers)))
        self(model, SGD(model.parameters(), lr=0.0))
        return self

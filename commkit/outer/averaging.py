"""Averages of the weights over time, which are evaluated in place of the last: training is not touched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..aggregators.health import are_finite
from .flat import full

# Running sums gather rounding errors.
_SUM_AGAIN_EVERY = 50


class WeightAverage(ABC):
    """Takes note of a model's trainable weights, in host memory and full precision, when told to. Weights that are
    not finite are passed over.

    Args:
        model: whose.

    Attributes:
        updates: how many snapshots have been taken into account.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.updates = 0

    def update(self) -> bool:
        """Take the weights as they are into account; call it after an outer round, an epoch or every so
        many steps. False: they are not finite and were passed over."""
        live = {n: p.detach() for n, p in self._model.named_parameters() if p.requires_grad}
        if not are_finite(live.values()):
            return False
        self._take({name: full(x).cpu() for name, x in live.items()})
        self.updates += 1
        return True

    @abstractmethod
    def average(self) -> dict[str, Tensor]:
        """By parameter name.

        Raises:
            RuntimeError: there was no update.
        """

    @abstractmethod
    def _take(self, weights: dict[str, Tensor]) -> None: ...

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Inside, the model has the average weights; afterwards its own again, bit for bit. Batch-norm
        statistics are of other weights: see :func:`~commkit.outer.recompute_batch_norm`, whose outcome
        is undone too."""
        average = self.average()
        kept = {name: x.detach().clone() for name, x in self._model.state_dict().items()}
        with torch.no_grad():
            for name, p in self._model.named_parameters():
                if name in average:
                    p.copy_(average[name])
        try:
            yield self._model
        finally:
            self._model.load_state_dict(kept)

    def _require_updates(self) -> None:
        if not self.updates:
            raise RuntimeError("nothing to average yet; call update() first")


class LatestWeightAverage(WeightAverage):
    """LAWA (Kaddour 2022): the plain mean of the last ``k`` snapshots. It is ahead of the last weights while the
    learning rate is high, and saves the time that a decay would take to show how good a run is.

    State: 4 (k + 1) bytes per parameter, in host memory.

    Args:
        model: whose.
        k: 6 or so, taken once per epoch or every few hundred steps.

    Raises:
        ValueError: ``k`` below 1.
    """

    def __init__(self, model: nn.Module, k: int = 6) -> None:
        if k < 1:
            raise ValueError(f"k={k} must be >= 1; use 6")
        super().__init__(model)
        self._snapshots: deque[dict[str, Tensor]] = deque()
        self._k = k
        self._sum: dict[str, Tensor] = {}

    def average(self) -> dict[str, Tensor]:
        self._require_updates()
        return {name: x / len(self._snapshots) for name, x in self._sum.items()}

    def _take(self, weights: dict[str, Tensor]) -> None:
        self._snapshots.append(weights)
        dropped = self._snapshots.popleft() if len(self._snapshots) > self._k else None
        if not self._sum or self.updates % _SUM_AGAIN_EVERY == 0:
            self._add_up()
            return
        for name, total in self._sum.items():
            total += weights[name]
            if dropped is not None:
                total -= dropped[name]

    def _add_up(self) -> None:
        self._sum = {name: torch.zeros_like(x) for name, x in self._snapshots[-1].items()}
        for snapshot in self._snapshots:
            for name, total in self._sum.items():
                total += snapshot[name]

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "snapshots": list(self._snapshots)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: more snapshots than ``k``.
        """
        if len(state["snapshots"]) > self._k:
            raise ValueError(
                f"the state has {len(state['snapshots'])} snapshots and k={self._k}; use the k that it was saved with"
            )
        self.updates = state["updates"]
        self._snapshots = deque(
            {name: x.clone() for name, x in snapshot.items()} for snapshot in state["snapshots"]
        )
        if self._snapshots:
            self._add_up()


class OuterEMA(WeightAverage):
    """``psi <- d psi + (1 - d) w`` once per outer round, with ``d = min(decay, (1 + r) / (10 + r))`` in round r, so
    that the start is forgotten soon. Nesterov's outer steps overshoot; the average does not.

    It needs no communication where replicas are equal. Of gossip's, which differ, each has its own.

    State: 4 bytes per parameter, in host memory.

    Args:
        model: whose.
        decay: 0.9 to 0.99 per round; of one per inner step, its power of ``sync_every``.
        warm_up: False uses ``decay`` from the first round on.

    Raises:
        ValueError: ``decay`` outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.95, warm_up: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be in [0, 1); use 0.95")
        super().__init__(model)
        self._decay, self._warm_up = decay, warm_up
        self._average: dict[str, Tensor] = {}

    def average(self) -> dict[str, Tensor]:
        self._require_updates()
        return {name: x.clone() for name, x in self._average.items()}

    def _take(self, weights: dict[str, Tensor]) -> None:
        if not self._average:
            self._average = weights
            return
        r = self.updates
        decay = min(self._decay, (1 + r) / (10 + r)) if self._warm_up else self._decay
        for name, x in self._average.items():
            x.lerp_(weights[name], 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": dict(self._average)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = state["updates"]
        self._average = {name: x.clone() for name, x in state["average"].items()}

"""EF21: send the change of an estimate of the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..registry import register
from ..types import StateDict
from .staged import StagedTensors, joined, parted, recycled

_OWN, _MEAN, _AVERAGE = "own_estimate", "mean_estimate", "average"


@register("feedback", "ef21")
@dataclass(slots=True)
class EF21:
    """``c_i = C(g_i - h_i); h_i = h_i + c_i; h = h + mean c_i``, and the optimizer gets h (Richtarik et al.
    2021, algorithm 2).

    Under a constant gradient h converges to it linearly. Noise of small batches does not average out;
    ``momentum`` below 1 mends that. State: h_i and h, 8 bytes per compressed element (12 with momentum), and
    as much again between a reduction and the end of its step; on a CPU for good but for the momentum's, since
    fresh memory in every step would cost more than the arithmetic.

    Args:
        momentum: a of EF21-SGDM (Fatkhullin et al. 2023): ``v_i = (1-a) v_i + a g_i`` takes the place of
            g_i. 1 is EF21; 0.1 suits stochastic gradients.

    Raises:
        ValueError: momentum outside (0, 1].
    """

    momentum: float = 1.0
    _own: StagedTensors = field(default_factory=recycled, init=False, repr=False)
    _mean: StagedTensors = field(default_factory=recycled, init=False, repr=False)
    _average: StagedTensors = field(default_factory=StagedTensors, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.momentum <= 1:
            raise ValueError(f"momentum={self.momentum} must be in (0, 1]; use 1, or 0.1")

    @property
    def needs_contraction(self) -> bool:
        return True

    @property
    def changes_mean(self) -> bool:
        return True

    def holds(self, key: str) -> bool:
        return key in self._mean

    def compensate(self, x: Tensor, key: str) -> Tensor:
        """``g - h_i``, or ``v_i - h_i``, as a fresh tensor."""
        g = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        if self.momentum < 1:
            average = self._average.get(key)
            if average is not None:
                g = torch.lerp(average, g, self.momentum)
            self._average.stage(key, g.clone())
        own = self._own.get(key)
        return g if own is None else g.sub_(own)

    def update(self, compensated: Tensor, sent: Tensor, key: str) -> None:
        self._own.stage_sum(key, sent)

    def deliver(self, mean: Tensor, key: str) -> Tensor:
        return self._mean.stage_sum(key, mean)

    def release(self, x: Tensor, key: str) -> Tensor:
        """Nothing of the past is unsent: an estimate only stood in for this gradient."""
        for kept in (self._own, self._mean, self._average):
            kept.stage(key, None)
        return x

    def commit(self, ok: bool) -> None:
        for kept in (self._own, self._mean, self._average):
            kept.commit(ok)

    def norm(self) -> float:
        """0: what a step leaves unsent is sent as part of the next difference, not carried."""
        return 0.0

    def state_dict(self) -> StateDict:
        return joined(StagedTensors(), self._parts())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        parted(state, StagedTensors(), self._parts())

    def _parts(self) -> dict[str, StagedTensors]:
        return {_OWN: self._own, _MEAN: self._mean, _AVERAGE: self._average}

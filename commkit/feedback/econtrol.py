"""EControl: error feedback of controlled strength around an estimate of the gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops import two_norm
from ..registry import register
from ..types import StateDict
from .staged import StagedTensors, joined, parted, recycled

_OWN, _MEAN = "own_estimate", "mean_estimate"


@register("feedback", "econtrol")
@dataclass(slots=True)
class EControl:
    """``c_i = C(eta e_i + g_i - h_i); e_i = e_i + g_i - h_i - c_i; h_i = h_i + c_i; h = h + mean c_i``, and
    the optimizer gets the new h (Gao, Islamov and Stich 2024, algorithm 1).

    It converges for any contraction C when ranks hold different data, where plain error feedback stalls,
    and with small batches, where EF21 does. The sum of gradients minus the sum of all h is the mean e. State:
    e_i, h_i and h, 12 bytes per compressed element, and as much again between a reduction and the end of its
    step; on a CPU for good, since fresh memory in every step would cost more than the arithmetic.
    ``eta = 0`` is EF21.

    Args:
        eta: strength of the error's return. A quarter of the compressor's contraction delta is critically
            damped (0.025 for the largest 10 %); larger oscillates, smaller is slow.

    Raises:
        ValueError: eta outside [0, 1].
    """

    eta: float = 0.025
    _residual: StagedTensors = field(default_factory=recycled, init=False, repr=False)
    _own: StagedTensors = field(default_factory=recycled, init=False, repr=False)
    _mean: StagedTensors = field(default_factory=recycled, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} must be in [0, 1]; use a quarter of the density")

    @property
    def needs_contraction(self) -> bool:
        return True

    @property
    def changes_mean(self) -> bool:
        return True

    def holds(self, key: str) -> bool:
        return key in self._mean

    def compensate(self, x: Tensor, key: str) -> Tensor:
        """``eta e + g - h_i``, in the memory of the next residual."""
        own, residual = self._own.get(key), self._residual.get(key)
        target = self._residual.fresh(key, x)
        target.copy_(x) if own is None else torch.sub(x, own, out=target)
        return target if residual is None else target.add_(residual, alpha=self.eta)

    def update(self, compensated: Tensor, sent: Tensor, key: str) -> None:
        """Stage the next estimate, and the next residual in the memory of ``compensated``."""
        self._own.stage_sum(key, sent)
        before = self._residual.get(key)
        residual = torch.zeros_like(sent) if sent is compensated else compensated.sub_(sent)
        self._residual.stage(
            key, residual if before is None else residual.add_(before, alpha=1 - self.eta)
        )

    def deliver(self, mean: Tensor, key: str) -> Tensor:
        return self._mean.stage_sum(key, mean)

    def release(self, x: Tensor, key: str) -> Tensor:
        residual = self._residual.get(key)
        for kept in (self._residual, self._own, self._mean):
            kept.stage(key, None)
        return x if residual is None else residual + x

    def commit(self, ok: bool) -> None:
        for kept in (self._residual, self._own, self._mean):
            kept.commit(ok)

    def norm(self) -> float:
        return math.hypot(*(float(two_norm(e)) for e in self._residual.values()))

    def state_dict(self) -> StateDict:
        """The residual by parameter name, ``own_estimate::NAME`` and ``mean_estimate::NAME``. Averaged over
        ranks, the first estimate becomes the second, so that a changed world size keeps the identity."""
        return joined(self._residual, {_OWN: self._own, _MEAN: self._mean})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        parted(state, self._residual, {_OWN: self._own, _MEAN: self._mean})

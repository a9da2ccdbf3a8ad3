"""Momentum before compression: what is sent is the running mean of the gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..registry import register
from ..types import StateDict
from .staged import StagedTensors


@register("feedback", "momentum")
@dataclass(slots=True)
class Momentum:
    """``m = beta m + (1 - beta) x; send C(m)``, and nothing is subtracted from m (Signum: Bernstein et al.
    2018, algorithm 1).

    Nothing counts as unsent: what compression loses is lost, and a tensor that is not compressed any more is
    sent as it is. The momenta are this rank's own, in float32 (float64 for float64 gradients): 4 bytes per
    compressed element, and another 4 between a reduction and the end of its step. At another world size every
    rank starts from their mean.

    Args:
        beta: share of the old momentum, in [0, 1). 0.9 averages over about ten steps, and gives every step's
            sign ten times the evidence. The optimizer should have no momentum of its own.

    Raises:
        ValueError: beta out of range.
    """

    beta: float = 0.9
    _momenta: StagedTensors = field(default_factory=StagedTensors, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta={self.beta} must be in [0, 1); use 0.9, or 0 for no momentum")

    @property
    def needs_contraction(self) -> bool:
        return False

    @property
    def changes_mean(self) -> bool:
        return False

    def holds(self, key: str) -> bool:
        return False

    def compensate(self, x: Tensor, key: str) -> Tensor:
        """The new momentum as a fresh tensor in the work dtype."""
        new = x.to(torch.promote_types(x.dtype, torch.float32)) * (1 - self.beta)
        old = self._momenta.get_like(key, x, "momentum")
        return new if old is None else new.add_(old, alpha=self.beta)

    def update(self, compensated: Tensor, sent: Tensor, key: str) -> None:
        """Stage the new momentum, whatever was sent of it."""
        self._momenta.stage(key, compensated)

    def deliver(self, mean: Tensor, key: str) -> Tensor:
        return mean

    def release(self, x: Tensor, key: str) -> Tensor:
        return x

    def commit(self, ok: bool) -> None:
        self._momenta.commit(ok)

    def norm(self) -> float:
        return 0.0

    def state_dict(self) -> StateDict:
        return self._momenta.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._momenta.load_state_dict(state)

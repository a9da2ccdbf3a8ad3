"""Error feedback: what is not sent now is added to what comes next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..addends import Addends, Debt
from ..ops import empty, two_norm
from ..registry import register
from ..types import StateDict
from .staged import StagedTensors

# Of a square. In a smaller difference the rounding errors of float32 are grown a hundredfold.
_CANCELLED = 0.01


@register("feedback", "error_feedback")
@dataclass(slots=True)
class ErrorFeedback:
    """``delta = decay e + x; send C(delta); e = delta - sent`` (Seide et al. 2014; Karimireddy et al. 2019).

    Without decay, the sum of everything sent plus the residual equals the sum of everything put in.
    Residuals are this rank's own, in float32 (float64 for float64 gradients): 4 bytes per compressed
    element, and another 4 between a reduction and the end of its step, so that a step that is given up
    leaves them untouched. Where a fused path takes what was sent on its way through the next step, it is in
    the residual until then, or until anybody asks for it.

    Args:
        decay: share of the residual that is carried on. 1 loses nothing. Below 1 the residual is a
            momentum from which everything sent is subtracted (DeMo, Peng et al. 2024: 0.999), or forgets
            what is stale.

    Raises:
        ValueError: decay outside (0, 1].
    """

    decay: float = 1.0
    _residuals: StagedTensors = field(default_factory=StagedTensors, init=False, repr=False)
    _debts: dict[str, Debt] = field(default_factory=dict, init=False, repr=False)
    _staged_debts: dict[str, Debt] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay={self.decay} must be in (0, 1]; use 1 to lose nothing")

    @property
    def needs_contraction(self) -> bool:
        return True

    @property
    def changes_mean(self) -> bool:
        return False

    def holds(self, key: str) -> bool:
        return key in self._residuals

    def compensate(self, x: Tensor, key: str) -> Tensor:
        """``x + e`` as a fresh tensor in the work dtype."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        residual = self._settled(x, key)
        out = empty(x.shape, dtype, x.device)
        if residual is None:
            return out.copy_(x)
        return torch.add(x, residual, alpha=self.decay, out=out)

    def addends(self, x: Tensor, key: str) -> Addends | None:
        """What :meth:`compensate` adds up, not to be written to; None where a fused path must not: there is no
        residual, it decays, is of float64, or its memory or that of ``x`` has gaps."""
        residual = self._residuals.get_like(key, x, "residual")
        if residual is None or self.decay != 1 or residual.dtype != torch.float32:
            return None
        if not (residual.is_contiguous() and x.is_contiguous()):
            return None
        return Addends(residual, x, self._debts.get(key, Debt()))

    def compensate_(self, x: Tensor, key: str) -> Tensor:
        """:meth:`compensate` in the memory of ``x``, which is the caller's own and of the work dtype."""
        residual = self._settled(x, key)
        return x if residual is None else x.add_(residual, alpha=self.decay)

    def update(self, compensated: Tensor, sent: Tensor, key: str) -> None:
        """Stage ``e = compensated - sent``, in the memory of ``compensated``. ``sent is compensated``
        says that nothing was lost; then no residual is kept."""
        self.stage(key, None if sent is compensated else compensated.sub_(sent))

    def deliver(self, mean: Tensor, key: str) -> Tensor:
        return mean

    def release(self, x: Tensor, key: str) -> Tensor:
        whole = self.compensate(x, key)
        self.stage(key, None)
        return whole

    def stage(self, key: str, residual: Tensor | None, debt: Debt | None = None) -> None:
        """Stage a residual that a fused path has worked out, and what is still to be taken from it; None: that there
        is none."""
        self._residuals.stage(key, residual)
        self._staged_debts[key] = debt or Debt()

    def commit(self, ok: bool) -> None:
        self._residuals.commit(ok)
        if ok:
            self._debts |= self._staged_debts
        self._staged_debts.clear()

    def norm(self) -> float:
        return math.hypot(*(self._norm_of(key, e) for key, e in self._residuals.items()))

    def state_dict(self) -> StateDict:
        state = self._residuals.state_dict()
        for key, residual in state.items():
            self._settle_(key, residual)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._residuals.load_state_dict(state)
        self._debts.clear()
        self._staged_debts.clear()

    def _settled(self, x: Tensor, key: str) -> Tensor | None:
        residual = self._residuals.get_like(key, x, "residual")
        if residual is not None:
            self._settle_(key, residual)
        return residual

    def _settle_(self, key: str, residual: Tensor) -> None:
        debt = self._debts.pop(key, None)
        if debt is not None:
            debt.settle_(residual)

    def _norm_of(self, key: str, residual: Tensor) -> float:
        norm, debt = float(two_norm(residual)), self._debts.get(key)
        if debt is None or not debt.means:
            return norm
        square = norm * norm - debt.squares(residual)
        if square > _CANCELLED * norm * norm:
            return math.sqrt(square)
        self._settle_(key, residual)
        return float(two_norm(residual))

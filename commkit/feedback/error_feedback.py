"""Error feedback: what is not sent now is added to what comes next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops import empty, two_norm
from ..registry import register
from ..types import StateDict
from .staged import StagedTensors


@register("feedback", "error_feedback")
@dataclass(slots=True)
class ErrorFeedback:
    """``delta = decay e + x; send C(delta); e = delta - sent`` (Seide et al. 2014; Karimireddy et al. 2019).

    Without decay, the sum of everything sent plus the residual equals the sum of everything put in.
    Residuals are this rank's own, in float32 (float64 for float64 gradients): 4 bytes per compressed
    element, and another 4 between a reduction and the end of its step, so that a step that is given up
    leaves them untouched.

    Args:
        decay: share of the residual that is carried on. 1 loses nothing. Below 1 the residual is a
            momentum from which everything sent is subtracted (DeMo, Peng et al. 2024: 0.999), or forgets
            what is stale.

    Raises:
        ValueError: decay outside (0, 1].
    """

    decay: float = 1.0
    _residuals: StagedTensors = field(default_factory=StagedTensors, init=False, repr=False)

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
        residual = self._residuals.get_like(key, x, "residual")
        out = empty(x.shape, dtype, x.device)
        if residual is None:
            return out.copy_(x)
        return torch.add(x, residual, alpha=self.decay, out=out)

    def addend(self, x: Tensor, key: str) -> Tensor | None:
        """What :meth:`compensate` adds to ``x``, not to be written to; None where a fused path must not: there is
        nothing, it decays, or its memory or that of ``x`` has gaps."""
        residual = self._residuals.get_like(key, x, "residual")
        if residual is None or self.decay != 1:
            return None
        return residual if residual.is_contiguous() and x.is_contiguous() else None

    def compensate_(self, x: Tensor, key: str) -> Tensor:
        """:meth:`compensate` in the memory of ``x``, which is the caller's own and of the work dtype."""
        residual = self._residuals.get_like(key, x, "residual")
        return x if residual is None else x.add_(residual, alpha=self.decay)

    def update(self, compensated: Tensor, sent: Tensor, key: str) -> None:
        """Stage ``e = compensated - sent``, in the memory of ``compensated``. ``sent is compensated``
        says that nothing was lost; then no residual is kept."""
        if sent is compensated:
            self._residuals.stage(key, None)
        else:
            self._residuals.stage(key, compensated.sub_(sent))

    def deliver(self, mean: Tensor, key: str) -> Tensor:
        return mean

    def release(self, x: Tensor, key: str) -> Tensor:
        whole = self.compensate(x, key)
        self._residuals.stage(key, None)
        return whole

    def stage(self, key: str, residual: Tensor) -> None:
        """Stage a residual that a fused path has worked out."""
        self._residuals.stage(key, residual)

    def commit(self, ok: bool) -> None:
        self._residuals.commit(ok)

    def norm(self) -> float:
        return math.hypot(*(float(two_norm(e)) for e in self._residuals.values()))

    def state_dict(self) -> StateDict:
        return self._residuals.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._residuals.load_state_dict(state)

"""Error feedback: what is not sent now is added to what comes next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops import two_norm
from ..registry import register
from ..types import Feedback, StateDict
from .staged import StagedTensors


@register("feedback", "error_feedback")
@dataclass(slots=True)
class ErrorFeedback:
    """``delta = x + e; send C(delta); e = delta - sent`` (Seide et al. 2014; Karimireddy et al. 2019).

    Sum of everything sent plus the residual equals the sum of everything put in. Residuals are this
    rank's own, in float32 (float64 for float64 gradients): 4 bytes per compressed element, and another 4
    between a reduction and the end of its step, so that a step that is given up leaves them untouched.
    """

    _residuals: StagedTensors = field(default_factory=StagedTensors, init=False, repr=False)

    def holds(self, key: str) -> bool:
        return key in self._residuals

    def compensate(self, x: Tensor, key: str) -> Tensor:
        """``x + e`` as a fresh tensor in the work dtype."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        residual = self._residuals.get_like(key, x, "residual")
        return x.to(dtype, copy=True) if residual is None else torch.add(residual, x)

    def update(self, compensated: Tensor, sent: Tensor, key: str) -> None:
        """Stage ``e = compensated - sent``, in the memory of ``compensated``. ``sent is compensated``
        says that nothing was lost; then no residual is kept."""
        if sent is compensated:
            self._residuals.stage(key, None)
        else:
            self._residuals.stage(key, compensated.sub_(sent))

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


def check_error_feedback(feedback: Feedback, part: object, field: str) -> None:
    """Refuse error feedback on a part (compressor or aggregator) that it diverges on.

    Raises:
        TypeError: ``feedback`` is error feedback, and ``part`` says that it does not allow it.
    """
    if isinstance(feedback, ErrorFeedback) and not getattr(part, "allows_error_feedback", True):
        raise TypeError(
            f"{field}=error_feedback diverges on {type(part).__name__}, whose errors may be as large as its "
            f"input (allows_error_feedback=False); use {field}='none', or a compressor that loses less, for "
            "example sign, topk or block_quantize"
        )

"""No feedback: what is not sent is lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..registry import register
from ..types import StateDict


@register("feedback", "none")
@dataclass(slots=True)
class NoFeedback:
    """Keeps nothing: for unbiased or lossless compressors."""

    @property
    def needs_contraction(self) -> bool:
        return False

    @property
    def changes_mean(self) -> bool:
        return False

    def holds(self, key: str) -> bool:
        return False

    def compensate(self, x: Tensor, key: str) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def update(self, compensated: Tensor, sent: Tensor, key: str) -> None:
        pass

    def deliver(self, mean: Tensor, key: str) -> Tensor:
        return mean

    def release(self, x: Tensor, key: str) -> Tensor:
        return x

    def commit(self, ok: bool) -> None:
        pass

    def norm(self) -> float:
        return 0.0

    def state_dict(self) -> StateDict:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state:
            raise ValueError(
                f"feedback 'none' got {len(state)} residuals (first: {next(iter(state))!r}), which it "
                "cannot keep; resume with the feedback that saved them"
            )

"""Factors that a power iteration begins with: those of the last step, or drawn anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..feedback import StagedTensors
from ..types import StateDict, TensorCtx


class WarmStarts:
    """One factor of every matrix from step to step, of shape (rank, length), by name."""

    def __init__(self) -> None:
        self._kept = StagedTensors()

    def starts(
        self, rank: int, length: int, ctxs: Sequence[TensorCtx], like: Tensor
    ) -> list[Tensor]:
        """The factor that each tensor begins with, (rank, length) in the dtype and device of ``like``."""
        return [self._start(rank, length, ctx, like) for ctx in ctxs]

    def stage(self, key: str, factor: Tensor, start: Tensor) -> None:
        """Keep ``factor`` after this step. Only its span matters: scaled to 1 it neither over- nor
        underflows. A zero factor (a step without gradient) would forget the span, so ``start`` stays."""
        peak = factor.abs().amax()
        # Contiguous: products with other strides round differently, and a checkpoint forgets strides.
        self._kept.stage(key, torch.where(peak > 0, factor / peak, start).contiguous())

    def _start(self, rank: int, length: int, ctx: TensorCtx, like: Tensor) -> Tensor:
        last = self._kept.get(ctx.key)
        if last is None or last.shape[1] != length:
            return _fresh_rows(rank, length, ctx, like)
        return _with_rows(last, rank, ctx).to(like)

    def commit(self, ok: bool) -> None:
        self._kept.commit(ok)

    def state_dict(self) -> StateDict:
        return self._kept.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._kept.load_state_dict(state)


def _fresh_rows(rank: int, length: int, ctx: TensorCtx, like: Tensor) -> Tensor:
    """(rank, length) standard normal, from shared randomness drawn on the CPU: equal on all ranks."""
    generator = torch.Generator().manual_seed(ctx.shared_seed(rank))
    return torch.randn(rank, length, generator=generator).to(like)


def _with_rows(last: Tensor, rank: int, ctx: TensorCtx) -> Tensor:
    """``last`` with exactly ``rank`` rows: the surplus dropped, what is missing drawn anew."""
    if last.shape[0] >= rank:
        return last[:rank]
    return torch.cat([last, _fresh_rows(rank - last.shape[0], last.shape[1], ctx, last)])

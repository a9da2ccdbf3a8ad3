"""Residuals and gradients on their way into one pass that adds and compresses them: the fused path of error feedback,
which gives the bits of the parts one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from .ops import accumulate_signs_, pack_signs
from .types import Aggregated, Comm, Compressor, Payload, TensorCtx


@dataclass(slots=True)
class Debt:
    """What was sent of a residual and is still in it: ``m sgn(x)`` of each part, where m = mean|x| and sgn(0) = 1.
    The next pass takes it on its way, or :meth:`settle_` at once; both give the same bits.

    Args:
        means: by where its part begins in the flattened residual, in order: (1,) float32.
    """

    means: dict[int, Tensor] = field(default_factory=dict)

    def settle_(self, residual: Tensor) -> None:
        """Take all of it from the contiguous ``residual``; then nothing is owed any more."""
        for (start, end), mean in zip(self._spans(residual), self.means.values(), strict=True):
            part = residual.view(-1)[start:end]
            accumulate_signs_(part, [pack_signs(part)], -mean)
        self.means = {}

    def squares(self, residual: Tensor) -> float:
        """By how much the square of the 2-norm falls when it is taken, if there is any: ``n m^2`` of each part of n
        elements."""
        counts = torch.tensor([end - start for start, end in self._spans(residual)])
        means = torch.cat(list(self.means.values())).cpu().double()
        return float((counts * means.square()).sum())

    def _spans(self, residual: Tensor) -> Iterator[tuple[int, int]]:
        starts = list(self.means)
        return zip(starts, [*starts[1:], residual.numel()], strict=False)  # none at all have no end


@dataclass(frozen=True, slots=True)
class Addends:
    """What is to be added up: tensors of one shape, contiguous.

    Args:
        residual: float32.
        gradient: of any float dtype.
        debt: of the residual.
    """

    residual: Tensor
    gradient: Tensor
    debt: Debt

    def parts(self, spans: Sequence[tuple[int, int]]) -> list[AddendsPart]:
        """Those that begin and end there, which are all. A debt of other parts is settled first."""
        if self.debt.means and list(self.debt.means) != [start for start, _ in spans]:
            self.debt.settle_(self.residual)
        residual, gradient, means = self.residual.view(-1), self.gradient.view(-1), self.debt.means
        return [
            AddendsPart(residual[start:end], gradient[start:end], means.get(start))
            for start, end in spans
        ]


@dataclass(frozen=True, slots=True)
class AddendsPart:
    """``residual - sent * sgn(residual) + gradient``.

    Args:
        residual, gradient: (n,), contiguous.
        sent: (1,) float32; None: nothing is to be taken.
    """

    residual: Tensor
    gradient: Tensor
    sent: Tensor | None


@runtime_checkable
class CompressesSums(Protocol):
    """A compressor with a fused path."""

    def compress_sums(
        self,
        sums: Sequence[Tensor],
        residuals: Sequence[Tensor],
        sent: Sequence[Tensor | None],
        gradients: Sequence[Tensor],
        ctxs: Sequence[TensorCtx],
        salt: int = 0,
    ) -> list[Payload]:
        """``sums[i] = residuals[i] - sent[i] sgn(residuals[i]) + gradients[i]``, and ``compress_each`` of them.

        Args:
            sums: (n,) float32, contiguous, with memory of their own.
            residuals, gradients: (n,), contiguous.
            sent: see :attr:`AddendsPart.sent`.
        """

    def compress_means(
        self,
        sums: Sequence[Tensor],
        residuals: Sequence[Tensor],
        sent: Sequence[Tensor | None],
        received: Sequence[Sequence[Payload]],
        ctxs: Sequence[TensorCtx],
        salt: int = 0,
    ) -> list[Payload]:
        """:meth:`compress_sums` where the gradients are the means of what the ranks sent of each, ``received[i]``."""

    def nothing_sent(self, received: Sequence[Sequence[Payload]]) -> list[bool]:
        """Whether all payloads of each are of zeros."""

    def mean_sent(self, payload: Payload) -> Tensor | None:
        """m = mean|x|, (1,) float32, if what ``payload`` sends of ``x`` is ``m sgn(x)`` with sgn(0) = 1, so that it can
        be taken from ``x`` later, without the payload. None: it is something else."""


@runtime_checkable
class AddsResiduals(Protocol):
    """An aggregator with a fused path."""

    @property
    def adds_residuals(self) -> bool:
        """Whether its compressor has one."""

    def aggregate_sums(
        self,
        sums: Sequence[Tensor],
        addends: Sequence[Addends | None],
        ctxs: Sequence[TensorCtx],
        comm: Comm,
    ) -> list[Aggregated]:
        """``aggregate`` of ``sums``, contiguous and of the work dtype; where there are ``addends``, their sum is written
        there first. It is called in the place of ``aggregate``: a subclass that changes one has to change both."""


@cache
def _has_fused_path(kind: type[Compressor]) -> bool:
    return issubclass(kind, CompressesSums)


def compresses_sums(compressor: Compressor) -> TypeGuard[CompressesSums]:
    """Whether it has a fused path; asked for every tensor of every step, where a look at all methods takes too long."""
    return _has_fused_path(type(compressor))


def debt_of(compressor: Compressor, sent: Mapping[int, Payload]) -> Debt | None:
    """That of what was sent, by where its part begins; None where it has to be taken at once."""
    if not compresses_sums(compressor):
        return None
    means = {start: compressor.mean_sent(payload) for start, payload in sent.items()}
    known = {start: mean for start, mean in means.items() if mean is not None}
    return Debt(known) if len(known) == len(means) else None

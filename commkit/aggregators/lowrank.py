"""The linear algebra of low-rank aggregation, over matrices of one shape.

Q is kept as (rank, columns): with a long inner stride, CPU matrix products by a thin matrix run three
times slower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..metrics import profiler_range
from ..types import Aggregated


class LowRank(Aggregated):
    """A mean ``P Q`` and a contribution ``P_own Q_own``, kept as pairs of factors: (n, r) and (r, m).

    Products go straight to where they are wanted, which saves two passes over every gradient.
    """

    __slots__ = ("_factors", "_own")

    def __init__(
        self,
        factors: tuple[Tensor, Tensor],
        own: tuple[Tensor, Tensor],
        shape: torch.Size,
        ranks: int,
    ) -> None:
        super().__init__(
            lambda: torch.mm(*factors).view(shape), lambda: torch.mm(*own).view(shape), ranks
        )
        self._factors, self._own = factors, own

    def mean_into(self, out: Tensor) -> None:
        p, q = self._factors
        if out.dtype == p.dtype and out.is_contiguous():
            with profiler_range("decompress"):
                torch.mm(p, q, out=out.view(p.shape[0], -1))
        else:
            super().mean_into(out)

    def take_sent_from(self, compensated: Tensor) -> bool:
        if not compensated.is_contiguous():
            return False
        p, q = self._own
        with profiler_range("decompress"):
            compensated.view(p.shape[0], -1).addmm_(p, q, alpha=-1)
        return True


def right_products(deltas: Sequence[Tensor], qs: Sequence[Tensor], out: Tensor) -> None:
    """``out[b] = deltas[b] @ qs[b]^T``; (n, m), (r, m) -> (b, n, r)."""
    if _batched(deltas):
        torch.bmm(torch.stack(list(deltas)), torch.stack(list(qs)).transpose(1, 2), out=out)
    else:
        for delta, q, p in zip(deltas, qs, out.unbind(), strict=True):
            torch.mm(delta, q.t(), out=p)


def left_products(ps: Tensor, deltas: Sequence[Tensor], out: Tensor) -> None:
    """``out[b] = ps[b]^T @ deltas[b]``; (b, n, r), (n, m) -> (b, r, m)."""
    if _batched(deltas):
        torch.bmm(ps.transpose(1, 2), torch.stack(list(deltas)), out=out)
    else:
        for delta, p, q in zip(deltas, ps.unbind(), out.unbind(), strict=True):
            # Not ``out=q``: this product rounds by the alignment of its result, and where q lies in the
            # buffer depends on what else is in the bucket.
            q.copy_(torch.mm(p.t(), delta))


def orthonormalise(ps: Tensor) -> Tensor:
    """Orthonormal columns that span those of ``ps``, (b, n, r) with r <= n, by Householder QR.

    Zero or dependent columns are safe: they become arbitrary directions orthogonal to the rest.
    """
    basis: Tensor = torch.linalg.qr(ps).Q
    return basis.contiguous()


def _batched(deltas: Sequence[Tensor]) -> bool:
    # On a CPU a batch is a loop anyway, and stacking would cost a copy of every gradient.
    return len(deltas) > 1 and deltas[0].device.type != "cpu"

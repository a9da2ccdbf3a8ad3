"""The linear algebra of low-rank aggregation, over matrices of one shape.

Q is kept as (rank, columns): with a long inner stride, CPU matrix products by a thin matrix run three
times slower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import Aggregated, TensorCtx


class LowRank(Aggregated):
    """A mean ``P Q`` and a contribution ``P Q_own``, kept as factors: (n, r), (r, m), (r, m).

    Products go straight to where they are wanted, which saves two passes over every gradient.
    """

    __slots__ = ("_own_q", "_p", "_q", "_shape")

    def __init__(self, p: Tensor, q: Tensor, own_q: Tensor, shape: torch.Size, ranks: int) -> None:
        super().__init__(
            lambda: torch.mm(p, q).view(shape), lambda: torch.mm(p, own_q).view(shape), ranks
        )
        self._p, self._q, self._own_q, self._shape = p, q, own_q, shape

    def mean_into(self, out: Tensor) -> None:
        if out.dtype == self._p.dtype and out.is_contiguous():
            torch.mm(self._p, self._q, out=out.view(self._p.shape[0], -1))
        else:
            super().mean_into(out)

    def take_sent_from(self, compensated: Tensor) -> bool:
        if not compensated.is_contiguous():
            return False
        compensated.view(self._p.shape[0], -1).addmm_(self._p, self._own_q, alpha=-1)
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
            torch.mm(p.t(), delta, out=q)


def orthonormalise(ps: Tensor) -> Tensor:
    """Orthonormal columns that span those of ``ps``, (b, n, r) with r <= n, by Householder QR.

    Zero or dependent columns are safe: they become arbitrary directions orthogonal to the rest.
    """
    basis: Tensor = torch.linalg.qr(ps).Q
    return basis.contiguous()


def fresh_rows(rank: int, columns: int, ctx: TensorCtx, like: Tensor) -> Tensor:
    """(rank, columns) standard normal, from shared randomness drawn on the CPU: equal on all ranks."""
    generator = torch.Generator().manual_seed(ctx.shared_seed(rank))
    return torch.randn(rank, columns, generator=generator).to(like)


def with_rows(q: Tensor, rank: int, ctx: TensorCtx) -> Tensor:
    """``q`` with exactly ``rank`` rows: the surplus dropped, what is missing drawn anew."""
    if q.shape[0] >= rank:
        return q[:rank]
    return torch.cat([q, fresh_rows(rank - q.shape[0], q.shape[1], ctx, q)])


def _batched(deltas: Sequence[Tensor]) -> bool:
    # On a CPU a batch is a loop anyway, and stacking would cost a copy of every gradient.
    return len(deltas) > 1 and deltas[0].device.type != "cpu"

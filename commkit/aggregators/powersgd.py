"""PowerSGD: a rank-r factorisation of the mean gradient by one warm-started power iteration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..feedback import StagedTensors
from ..registry import register
from ..types import SHARED, Aggregated, Comm, StateDict, TensorCtx, section
from .health import require_finite
from .lowrank import (
    LowRank,
    fresh_rows,
    left_products,
    orthonormalise,
    right_products,
    with_rows,
)


@dataclass(frozen=True, slots=True)
class _Group:
    """Matrices of one shape in a reduction; ``members`` are their places in it."""

    rows: int
    columns: int
    rank: int
    members: list[int]

    @property
    def p_numel(self) -> int:
        return len(self.members) * self.rows * self.rank

    @property
    def q_numel(self) -> int:
        return len(self.members) * self.rank * self.columns


@register("aggregator", "powersgd")
@dataclass(slots=True)
class PowerSGD:
    """``P = mean(delta_i Q^T); P = orth(P); Q_i = P^T delta_i; Q = mean(Q_i); mean = P Q`` (Vogels et al.
    2019, algorithm 1), with ``delta`` viewed as (shape[0], rest).

    Two all-reduces per reduction: one of all P and of all tensors that are not worth factorising, one of
    all Q. What a rank contributed is ``P Q_i``, the local form: its residual stays bounded, where the
    aggregated form of the paper's code grows like sqrt(steps). State: Q, 4 rank/rows bytes per element.

    Args:
        rank: columns of P. Payload and cost grow with it; 1-4 for convolutions, 4-32 for transformers.
            It may differ from the rank of loaded state: rows are dropped or drawn anew.
        min_compression_rate: a tensor is factorised only if that sends this many times fewer numbers;
            otherwise it is averaged densely. 0 factorises every matrix.
        warm_start: start from the last Q (needed for quality); off draws a new Q each step.

    Raises:
        ValueError: rank < 1 or a negative rate.
    """

    rank: int = 4
    min_compression_rate: float = 2.0
    warm_start: bool = True
    _q: StagedTensors = field(default_factory=StagedTensors, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be >= 1; use for example 4")
        if not self.min_compression_rate >= 0:
            raise ValueError(
                f"min_compression_rate={self.min_compression_rate} must be >= 0; use for example 2"
            )

    def factors(self, shape: torch.Size) -> tuple[int, int, int] | None:
        """(rows, columns, rank) of the factorisation of a tensor of this shape; None: it goes densely."""
        if len(shape) < 2 or shape.numel() == 0:
            return None
        rows = shape[0]
        columns = shape.numel() // rows
        rank = min(rows, columns, self.rank)
        pays = rank * (rows + columns) * self.min_compression_rate < rows * columns
        return (rows, columns, rank) if pays else None

    def aggregate(
        self, xs: Sequence[Tensor], ctxs: Sequence[TensorCtx], comm: Comm
    ) -> list[Aggregated]:
        dtypes = dict.fromkeys(x.dtype for x in xs)
        if len(dtypes) > 1:
            return self._aggregate_by_dtype(xs, ctxs, comm, list(dtypes))
        groups, dense = self._classify(ctxs)
        results: dict[int, Aggregated] = {}
        like = xs[0] if xs else torch.empty(0)

        matrices = [[xs[i].reshape(g.rows, g.columns) for i in g.members] for g in groups]
        dense_numel = sum(xs[i].numel() for i in dense)
        first = like.new_empty(dense_numel + sum(g.p_numel for g in groups))
        means, first_p = _split_dense(first, [xs[i] for i in dense])
        ps = _views(first_p, [(len(g.members), g.rows, g.rank) for g in groups])
        starts = [self._starts(group, ctxs, like) for group in groups]
        for deltas, start, p in zip(matrices, starts, ps, strict=True):
            right_products(deltas, start, out=p)
        if first.numel():
            comm.all_reduce(first.div_(comm.world_size))
        require_finite([first])  # inf or NaN in any delta has reached its P
        for i, mean in zip(dense, means, strict=True):
            results[i] = Aggregated(mean, xs[i], comm.world_size)

        second = like.new_empty(sum(g.q_numel for g in groups))
        qs = _views(second, [(len(g.members), g.rank, g.columns) for g in groups])
        ps = [orthonormalise(p) for p in ps]
        for deltas, p, q in zip(matrices, ps, qs, strict=True):
            left_products(p, deltas, out=q)
        own = second.clone()
        if second.numel():
            comm.all_reduce(second.div_(comm.world_size))
        require_finite([second])
        own_qs = _views(own, [(len(g.members), g.rank, g.columns) for g in groups])
        for group, start, p, q, own_q in zip(groups, starts, ps, qs, own_qs, strict=True):
            for place, i in enumerate(group.members):
                ctx = ctxs[i]
                results[i] = LowRank(p[place], q[place], own_q[place], ctx.shape, comm.world_size)
                if self.warm_start:
                    self._q.stage(ctx.key, _next_start(q[place], start[place]))
        return [results[i] for i in range(len(xs))]

    def _aggregate_by_dtype(
        self,
        xs: Sequence[Tensor],
        ctxs: Sequence[TensorCtx],
        comm: Comm,
        dtypes: Sequence[torch.dtype],
    ) -> list[Aggregated]:
        """Float32 and float64 tensors cannot share a buffer: one reduction for each."""
        results: dict[int, Aggregated] = {}
        for dtype in dtypes:
            places = [i for i, x in enumerate(xs) if x.dtype == dtype]
            part = self.aggregate([xs[i] for i in places], [ctxs[i] for i in places], comm)
            results.update(zip(places, part, strict=True))
        return [results[i] for i in range(len(xs))]

    def _classify(self, ctxs: Sequence[TensorCtx]) -> tuple[list[_Group], list[int]]:
        by_shape: dict[tuple[int, int, int], list[int]] = {}
        dense = []
        for i, ctx in enumerate(ctxs):
            factors = self.factors(ctx.shape)
            if factors is None:
                dense.append(i)
            else:
                by_shape.setdefault(factors, []).append(i)
        return [_Group(*factors, members) for factors, members in by_shape.items()], dense

    def _starts(self, group: _Group, ctxs: Sequence[TensorCtx], like: Tensor) -> list[Tensor]:
        """The Q that each matrix of the group begins with, (rank, columns) each."""
        starts = []
        for i in group.members:
            last = self._q.get(ctxs[i].key)
            if last is None or last.shape[1] != group.columns:
                starts.append(fresh_rows(group.rank, group.columns, ctxs[i], like))
            else:
                starts.append(with_rows(last, group.rank, ctxs[i]).to(like))
        return starts

    def commit(self, ok: bool) -> None:
        self._q.commit(ok)

    def state_dict(self) -> StateDict:
        return {f"{SHARED}/{key}": q for key, q in self._q.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._q.load_state_dict(section(state, SHARED))


def _next_start(q: Tensor, start: Tensor) -> Tensor:
    """Only the span of Q matters: scaled to 1 it neither over- nor underflows. A zero Q (a step without
    gradient) would forget the span, so the old one stays."""
    peak = q.abs().amax()
    return torch.where(peak > 0, q / peak, start)


def _split_dense(buffer: Tensor, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Copy ``tensors`` to the front of ``buffer``; their views in it, and the rest of it."""
    numels = [x.numel() for x in tensors]
    *flats, rest = buffer.split_with_sizes([*numels, buffer.numel() - sum(numels)])
    views = [flat.view(x.shape) for flat, x in zip(flats, tensors, strict=True)]
    for view, x in zip(views, tensors, strict=True):
        view.copy_(x)
    return views, rest


def _views(buffer: Tensor, shapes: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    parts = buffer.split_with_sizes([math.prod(shape) for shape in shapes]) if shapes else []
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

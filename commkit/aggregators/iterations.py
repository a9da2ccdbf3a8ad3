"""One step of subspace iteration on the mean of the ranks' matrices: both sides of it, or one in turn.

What a rank contributed is always the local form, its own factor beside the shared one: the residual stays
bounded, where that of the aggregated form grows like sqrt(steps).
"""

from __future__ import annotations

import math

import torch

from ..metrics import profiler_range
from ..types import Aggregated, Comm
from .health import require_finite
from .lowrank import LowRank, left_products, orthonormalise, right_products
from .matrices import Batch, tail, views
from .warm_start import WarmStarts


def two_sided(batch: Batch, starts_q: WarmStarts, keep: bool, comm: Comm) -> list[Aggregated]:
    """``P = orth(mean(delta_i Q^T)); Q_i = P^T delta_i; Q = mean(Q_i); mean = P Q``. Two all-reduces, of
    all P and the dense tensors, and of all Q."""
    groups, results = batch.groups, {}
    first, dense_means, ps = batch.buffer_with_dense([g.p_shape for g in groups])
    starts = [
        starts_q.starts(g.rank, g.columns, [batch.ctxs[i] for i in g.members], first)
        for g in groups
    ]
    deltas = [batch.deltas(g) for g in groups]
    with profiler_range("compress"):
        for matrices, start, p in zip(deltas, starts, ps, strict=True):
            right_products(matrices, start, out=p)
    _average(first, comm)  # inf or NaN in any delta has reached its P
    for i, mean in zip(batch.dense, dense_means, strict=True):
        results[i] = Aggregated(mean, batch.xs[i], comm.world_size)

    q_shapes = [g.q_shape for g in groups]
    second = first.new_empty(sum(map(math.prod, q_shapes)))
    with profiler_range("orthonormalise"):
        qs, ps = views(second, q_shapes), [orthonormalise(p) for p in ps]
    with profiler_range("compress"):
        for matrices, p, q in zip(deltas, ps, qs, strict=True):
            left_products(p, matrices, out=q)
    own_qs = views(second.clone(), q_shapes)
    _average(second, comm)
    for g, start, p, q, own_q in zip(groups, starts, ps, qs, own_qs, strict=True):
        for at, i in enumerate(g.members):
            shape, p_i = batch.ctxs[i].shape, p[at]
            results[i] = LowRank((p_i, q[at]), (p_i, own_q[at]), shape, comm.world_size)
            if keep:
                starts_q.stage(batch.ctxs[i].key, q[at], start[at])
    return [results[i] for i in range(len(batch.xs))]


def alternating(
    batch: Batch, starts_p: WarmStarts, starts_q: WarmStarts, comm: Comm
) -> list[Aggregated]:
    """Half an iteration, the sides in turn (Vogels et al.'s own later code; PowerGossip, 2020). At even
    steps ``P = orth(last P); Q_i = P^T delta_i; Q = mean(Q_i); mean = P Q``, at odd steps
    ``Q = orth(last Q); P_i = delta_i Q^T; P = mean(P_i); mean = P Q``. One all-reduce, with the dense
    tensors in it.

    Both factors are kept: after a step that was given up, the next one finds what it begins with.
    """
    groups, results = batch.groups, {}
    shapes = [g.p_shape if g.odd else g.q_shape for g in groups]
    buffer, dense_means, outs = batch.buffer_with_dense(shapes)
    bases = []
    for g, out in zip(groups, outs, strict=True):
        known, length = (starts_q, g.columns) if g.odd else (starts_p, g.rows)
        starts = known.starts(g.rank, length, [batch.ctxs[i] for i in g.members], buffer)
        with profiler_range("orthonormalise"):
            basis = orthonormalise(torch.stack(starts).transpose(1, 2))  # (b, length, rank)
        with profiler_range("compress"):
            if g.odd:
                basis = basis.transpose(1, 2).contiguous()
                right_products(batch.deltas(g), basis.unbind(), out=out)
            else:
                left_products(basis, batch.deltas(g), out=out)
        bases.append(basis)
    own_outs = views(tail(buffer, outs).clone(), shapes)
    _average(buffer, comm)  # inf or NaN in any delta has reached its product
    for i, mean in zip(batch.dense, dense_means, strict=True):
        results[i] = Aggregated(mean, batch.xs[i], comm.world_size)
    for g, basis, out, own in zip(groups, bases, outs, own_outs, strict=True):
        ctxs = [batch.ctxs[i] for i in g.members]
        found, length = (starts_p, g.rows) if g.odd else (starts_q, g.columns)
        before = found.starts(g.rank, length, ctxs, buffer)
        for at, (i, ctx) in enumerate(zip(g.members, ctxs, strict=True)):
            factors, own_factors = (
                ((out[at], basis[at]), (own[at], basis[at]))
                if g.odd
                else ((basis[at], out[at]), (basis[at], own[at]))
            )
            results[i] = LowRank(factors, own_factors, ctx.shape, comm.world_size)
            found.stage(ctx.key, out[at].t() if g.odd else out[at], before[at])
    return [results[i] for i in range(len(batch.xs))]


def _average(buffer: torch.Tensor, comm: Comm) -> None:
    """The ranks' mean, in place.

    Raises:
        NonFiniteError: it is not finite.
    """
    if buffer.numel():
        comm.all_reduce(buffer.div_(comm.world_size))
    require_finite([buffer])

"""Low rank, then few bits: PowerSGD whose factors travel quantised."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..compressors import BlockQuantize
from ..metrics import profiler_range
from ..registry import register
from ..types import SHARED, Aggregated, Comm, Compressor, StateDict, TensorCtx, section
from .exchange import Exchange
from .health import health, require_finite
from .lowrank import LowRank, left_products, orthonormalise, right_products
from .matrices import Batch, Factors, refuse_rank
from .sharding import Shard, shards_of
from .warm_start import WarmStarts


@register("aggregator", "lowrank_quantized")
@dataclass(slots=True)
class LowRankQuantized:
    """``P = orth(mean(C(delta_i Q^T))); Q_i = C(P^T delta_i); Q = C(mean(Q_i)); mean = P Q``, with ``delta``
    viewed as (shape[0], rest): the compression of DiLoCoX (Qi et al. 2025).

    Few-bit codes cannot be summed on the way, so both factors go in two shots (all-to-all, mean in full
    precision, all-to-all); all ranks decode the same bytes, owners of a share too. Errors in P cost
    nothing but energy that P misses, since Q is measured against P as it was decoded. What the second
    compression of Q loses is booked as the owner's: it is in the ``sent`` of the rank whose share it was, so
    the mean of what the ranks sent *is* the mean, and error feedback brings back both losses.

    Per matrix ``2 bits/8 rank (rows + columns)`` bytes and their scales, times (W-1)/W, on the wire.
    Other tensors are averaged densely. State: Q, 4 rank/rows bytes per element.

    Args:
        rank: columns of P. A mutable attribute: schedules set it between reductions, on all ranks alike; Q's
            surplus rows are dropped, missing ones drawn from shared randomness.
        compressor: of the factors, whose columns it sees one after another: blocks no longer than a matrix
            has rows and columns give columns scales of their own. int4 in blocks of 64, rounded to
            nearest, loses less than it is given for any input, as error feedback needs.
        min_compression_rate: as for :class:`PowerSGD`, counted in numbers, before quantisation.
        granule: as for :class:`TwoShot`.

    Attributes:
        energies: by matrix, (rank,) float64 in falling order: squared singular values of the last reduction's
            mean. Equal on all ranks; empty after a step that was given up.

    Raises:
        TypeError: the compressor's payload sizes depend on the data.
        ValueError: a rank < 1, a negative rate, or a granule below 8.
    """

    rank: int = 32
    compressor: Compressor = field(default_factory=lambda: BlockQuantize(4, 64, "nearest"))
    min_compression_rate: float = 2.0
    granule: int = 1024
    energies: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _staged: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _q: WarmStarts = field(default_factory=WarmStarts, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be >= 1; use for example 32")
        if not self.min_compression_rate >= 0:
            raise ValueError(
                f"min_compression_rate={self.min_compression_rate} must be >= 0; use for example 2"
            )
        if self.granule < 8:
            raise ValueError(f"granule={self.granule} must be >= 8; use for example 1024")
        if not self.compressor.fixed_size:
            raise TypeError(
                f"lowrank_quantized needs payloads of a fixed size but {type(self.compressor).__name__} has "
                "fixed_size=False; use a compressor whose payload_bytes depends on the shape alone"
            )

    def factors(self, shape: torch.Size) -> Factors | None:
        """(rows, columns, rank) of the factorisation of a tensor of this shape; None: it goes densely."""
        if len(shape) < 2 or shape.numel() == 0:
            return None
        rows = shape[0]
        columns = shape.numel() // rows
        rank = min(rows, columns, self.rank)
        pays = rank * (rows + columns) * self.min_compression_rate < rows * columns
        return (rows, columns, rank) if pays else None

    def prepare(self, ctxs: Sequence[TensorCtx], comm: Comm) -> None:
        """Refuse a rank that no matrix of the model has.

        Raises:
            ValueError: on every rank.
        """
        refuse_rank(self.rank, ctxs)

    def aggregate(
        self, xs: Sequence[Tensor], ctxs: Sequence[TensorCtx], comm: Comm
    ) -> list[Aggregated]:
        results: dict[int, Aggregated] = {}
        # Float32 and float64 tensors cannot share a buffer: one reduction for each.
        for dtype in dict.fromkeys(x.dtype for x in xs):
            places = [i for i, x in enumerate(xs) if x.dtype == dtype]
            batch = Batch(
                [xs[i] for i in places],
                [ctxs[i] for i in places],
                lambda ctx: self.factors(ctx.shape),
            )
            results.update(zip(places, self._iterate(batch, comm), strict=True))
        return [results[i] for i in range(len(xs))]

    def _iterate(self, batch: Batch, comm: Comm) -> list[Aggregated]:
        results: dict[int, Aggregated] = {}
        dense, means, _ = batch.buffer_with_dense([])
        if dense.numel():
            comm.all_reduce(dense.div_(comm.world_size))
        require_finite([dense])
        for i, mean in zip(batch.dense, means, strict=True):
            results[i] = Aggregated(mean, batch.xs[i], comm.world_size)

        groups = batch.groups
        if not groups:
            return [results[i] for i in range(len(batch.xs))]
        deltas = [batch.deltas(g) for g in groups]
        ctxs = [[batch.ctxs[i] for i in g.members] for g in groups]
        starts = [
            self._q.starts(g.rank, g.columns, of_group, dense)
            for g, of_group in zip(groups, ctxs, strict=True)
        ]
        ps = [dense.new_empty(g.p_shape) for g in groups]
        for matrices, start, p in zip(deltas, starts, ps, strict=True):
            right_products(matrices, start, out=p)
        # Transposed, so that a block of the code lies in one column.
        lying = [p.transpose(1, 2).contiguous() for p in ps]
        mean_ps, _ = self._averages(lying, ctxs, "P", comm)
        with profiler_range("orthonormalise"):
            bases = [orthonormalise(p.transpose(1, 2)) for p in mean_ps]
        qs = [dense.new_empty(g.q_shape) for g in groups]
        for matrices, basis, q in zip(deltas, bases, qs, strict=True):
            left_products(basis, matrices, out=q)
        mean_qs, own_qs = self._averages(qs, ctxs, "Q", comm)

        for g, start, p, q, own_q in zip(groups, starts, bases, mean_qs, own_qs, strict=True):
            wide = q.double()
            energies = torch.linalg.eigvalsh(wide @ wide.transpose(1, 2)).clamp_(min=0).flip(1)
            for at, i in enumerate(g.members):
                ctx = batch.ctxs[i]
                results[i] = LowRank((p[at], q[at]), (p[at], own_q[at]), ctx.shape, comm.world_size)
                self._q.stage(ctx.key, q[at], start[at])
                self._staged[ctx.key] = energies[at]
        return [results[i] for i in range(len(batch.xs))]

    def _averages(
        self,
        factors: Sequence[Tensor],
        ctxs: Sequence[Sequence[TensorCtx]],
        side: str,
        comm: Comm,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The mean of each factor over the ranks, the same bits everywhere, and what this rank sent: the mean of
        that over the ranks is the mean, but for rounding in full precision.

        Raises:
            NonFiniteError: on every rank, if any rank's factors held inf or NaN.
        """
        flats: list[Tensor] = []
        shards: list[Shard] = []
        for of_group, ctxs_of_group in zip(factors, ctxs, strict=True):
            for x, ctx in zip(of_group.unbind(), ctxs_of_group, strict=True):
                named = dataclasses.replace(ctx, key=f"{ctx.key}/{side}", shape=x.shape)
                shards += shards_of(len(flats), named, comm.world_size, self.granule)
                flats.append(x.reshape(-1))
        device = flats[0].device
        code, rank = self.compressor, comm.rank
        with profiler_range("compress"):
            payloads = {
                s: code.compress(flats[s.index][s.start : s.end], s.ctx, rank) for s in shards
            }
        exchange = Exchange(shards, comm)
        received = exchange.to_owners(payloads, health(flats, device))
        served = exchange.served_by(rank)
        with profiler_range("serve"):
            wanted = {
                s: code.combine([each[number] for each in received], s.ctx)
                for number, s in enumerate(served)
            }
            # ~rank: rounding must be independent of the first stage's.
            answers = [code.compress(wanted[s], s.ctx, ~rank) for s in served]
        told = exchange.to_all(answers, health(wanted.values(), device))

        means, sent = ([torch.empty_like(x) for x in factors] for _ in range(2))
        mean_flats = [x.view(-1) for of_group in means for x in of_group.unbind()]
        sent_flats = [x.view(-1) for of_group in sent for x in of_group.unbind()]
        for s in shards:
            with profiler_range("decompress"):
                mean = code.decompress(told[s], s.ctx).view(-1)
                own = code.decompress(payloads[s], s.ctx).view(-1)
            if s in wanted:
                own.add_(mean - wanted[s].view(-1), alpha=comm.world_size)
            mean_flats[s.index][s.start : s.end] = mean
            sent_flats[s.index][s.start : s.end] = own
        return means, sent

    def commit(self, ok: bool) -> None:
        self._q.commit(ok)
        self.energies = dict(self._staged) if ok else {}
        self._staged.clear()

    def state_dict(self) -> StateDict:
        return {f"{SHARED}/{key}": q for key, q in self._q.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._q.load_state_dict(section(state, SHARED))

"""PowerSGD: a rank-r factorisation of the mean gradient by warm-started power iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..registry import register
from ..types import SHARED, Aggregated, Comm, StateDict, TensorCtx, section
from .iterations import alternating, two_sided
from .matrices import Batch, Factors, refuse_rank
from .rank_schedule import Rank, checked, highest, rank_at
from .warm_start import WarmStarts

_LEFT = "left"


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
            A list of [step, rank] pairs changes it in mid-run, e.g. ``[[0, 16], [1000, 4]]``: a high rank
            while gradients change fast, as a softer start than the dense steps of
            :attr:`commkit.Policy.start_step` (whose first compressed step takes the rank of that step).
            Rows of Q are dropped or drawn anew, also when loaded state has another rank.
        min_compression_rate: a tensor is factorised only if that sends this many times fewer numbers;
            otherwise it is averaged densely. 0 factorises every matrix.
        warm_start: start from the last Q (needed for quality); off draws a new Q each step.
        iteration: "two_sided" as above. "alternating" does half of it per step, Q at even steps and P at
            odd ones, each against the other of the step before: one all-reduce and half the bytes and
            products, for latency-bound links; a subspace then takes two steps to follow the gradient, so
            compare at equal bytes (twice the rank). State: P and Q, 4 rank (1/rows + 1/columns) bytes.

    Raises:
        ValueError: a rank < 1, a schedule that does not begin at step 0 and increase, a negative rate, or
            "alternating" without a warm start.
    """

    rank: Rank = 4
    min_compression_rate: float = 2.0
    warm_start: bool = True
    iteration: Literal["two_sided", "alternating"] = "two_sided"
    _q: WarmStarts = field(default_factory=WarmStarts, init=False, repr=False)
    _p: WarmStarts = field(default_factory=WarmStarts, init=False, repr=False)

    def __post_init__(self) -> None:
        self.rank = checked(self.rank)
        if not self.min_compression_rate >= 0:
            raise ValueError(
                f"min_compression_rate={self.min_compression_rate} must be >= 0; use for example 2"
            )
        if self.iteration not in ("two_sided", "alternating"):
            raise ValueError(
                f"iteration={self.iteration!r} is unknown; use 'two_sided' or 'alternating'"
            )
        if self.iteration == "alternating" and not self.warm_start:
            raise ValueError(
                "iteration='alternating' with warm_start=False would project on random directions for "
                "ever; use warm_start=True, or iteration='two_sided'"
            )

    def factors(self, shape: torch.Size, step: int = 0) -> Factors | None:
        """(rows, columns, rank) of the factorisation of a tensor of this shape; None: it goes densely."""
        if len(shape) < 2 or shape.numel() == 0:
            return None
        rows = shape[0]
        columns = shape.numel() // rows
        rank = min(rows, columns, rank_at(self.rank, step))
        numbers = rank * (rows + columns) / (2 if self.iteration == "alternating" else 1)
        pays = numbers * self.min_compression_rate < rows * columns
        return (rows, columns, rank) if pays else None

    def prepare(self, ctxs: Sequence[TensorCtx], comm: Comm) -> None:
        """Refuse a rank that no matrix of the model has.

        Raises:
            ValueError: on every rank.
        """
        refuse_rank(highest(self.rank), ctxs, example=4)

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
                lambda ctx: self.factors(ctx.shape, ctx.step),
            )
            results.update(zip(places, self._iterate(batch, comm), strict=True))
        return [results[i] for i in range(len(xs))]

    def _iterate(self, batch: Batch, comm: Comm) -> list[Aggregated]:
        if self.iteration == "alternating":
            return alternating(batch, self._p, self._q, comm)
        return two_sided(batch, self._q, self.warm_start, comm)

    def commit(self, ok: bool) -> None:
        self._q.commit(ok)
        self._p.commit(ok)

    def state_dict(self) -> StateDict:
        state = {f"{SHARED}/{key}": q for key, q in self._q.state_dict().items()}
        return state | {f"{SHARED}/{_LEFT}/{key}": p for key, p in self._p.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        left = section(state, f"{SHARED}/{_LEFT}")
        self._p.load_state_dict(left if self.iteration == "alternating" else {})
        self._q.load_state_dict(
            {key: q for key, q in section(state, SHARED).items() if not key.startswith(f"{_LEFT}/")}
        )

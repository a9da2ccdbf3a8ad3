"""Robust combination of all ranks' payloads: a few faulty ranks cannot steer the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..metrics import profiler_range
from ..registry import register
from ..types import Aggregated, Comm, Compressor, Payload, TensorCtx
from .health import health
from .message import Layout
from .robust_rules import Rule, check_num_faulty, decide
from .stateless import Stateless


@register("aggregator", "robust")
@dataclass(slots=True)
class Robust(Stateless):
    """Everybody's payload goes to everybody, and each rank combines them by a rule that up to ``num_faulty``
    ranks cannot drag away, whatever they send; see :func:`~commkit.aggregators.robust_rules.decide`.

    Distances are of all tensors of one call together. They must be the whole model's: of a call per bucket
    each bucket would have another set of outliers, and an attacker who hides in small tensors gets through.
    Hence ``needs_whole_step``, at which adapters hand over all gradients at once; and the policy must compress
    every tensor (``min_numel: 0``), for what stays dense is averaged plainly.

    Differences from other aggregators:

    - An inf or NaN of up to ``num_faulty`` ranks does not make the step dense: those ranks are left out. Of more
      it does, as everywhere, so that a gradient scaler sees an overflow that all ranks have.
    - "nearest" compares with the rank's own vector, so ``mean`` differs between ranks: for methods whose replicas
      are allowed to (MoNNA). All other rules give the same bits everywhere.
    - Under a hierarchical aggregator the vectors are nodes' means, and each rank judges the tensors that it serves:
      one faulty rank makes a faulty node, and distances are of those tensors alone.
    - ``sent`` is what this rank's payload says, whether the rule took it or not: to be left out is a
      judgement, and must not be made up for in the next step. Error feedback is refused: a faulty step would
      stay in the residual for good.

    One collective per reduction, of ``W - 1`` messages; the messages of all ranks are in memory, and one tensor
    of all ranks decoded. Arithmetic is O(W P), for Krum O(W^2 P).

    Args:
        compressor: one whose payload sizes are known from the shape alone.
        rule: "trimmed_mean" and "median" are robust element by element and give up some of the averaging
            of noise; "multi_krum" and "nearest" leave out whole vectors and keep n - f of them, where honest ranks
            are alike; "norm_clip" limits how far each can pull; "krum" takes a single one.
        num_faulty: how many ranks may be anything. Each one costs averaging, so not more than is feared.

    Raises:
        TypeError: payload sizes depend on the data.
        ValueError: ``num_faulty`` is negative; when the group is known, too large for the rule.
    """

    needs_whole_step: ClassVar[bool] = True
    allows_error_feedback: ClassVar[bool] = False
    compressor: Compressor
    rule: Rule
    num_faulty: int

    def __post_init__(self) -> None:
        if not self.compressor.fixed_size:
            raise TypeError(
                f"robust needs payloads of a fixed size but {type(self.compressor).__name__} has "
                "fixed_size=False; use a compressor whose payload_bytes depends on the shape alone"
            )
        if self.num_faulty < 0:
            raise ValueError(f"num_faulty={self.num_faulty} must be >= 0; use for example 1")

    def prepare(self, ctxs: Sequence[TensorCtx], comm: Comm) -> None:
        check_num_faulty(self.rule, comm.world_size, self.num_faulty)

    def aggregate(
        self, xs: Sequence[Tensor], ctxs: Sequence[TensorCtx], comm: Comm
    ) -> list[Aggregated]:
        check_num_faulty(self.rule, comm.world_size, self.num_faulty)
        with profiler_range("compress"):
            payloads = self.compressor.compress_each(xs, ctxs, comm.rank)
        inputs = [] if self.compressor.shows_nonfinite else xs
        flag = health([*inputs, *(t for payload in payloads for t in payload)], ctxs[0].device)
        layout = Layout(payloads)
        rows = comm.all_gather(layout.encode(payloads, flag))
        gathered = [layout.decode(row) for row in rows]
        flags = (torch.stack([layout.mark(row) for row in rows]) == 0).tolist()
        stacks = [
            partial(self._stack, [of_rank[i] for of_rank in gathered], ctx)
            for i, ctx in enumerate(ctxs)
        ]
        verdict = decide(
            stacks,
            self.rule,
            self.num_faulty,
            comm.rank,
            [rank for rank, ok in enumerate(flags) if not ok],
        )
        return [
            Aggregated(
                lambda stack=stack: verdict.combine(stack()),  # type: ignore[misc]
                partial(self.compressor.decompress, payload, ctx),
                len(verdict.members),
            )
            for stack, payload, ctx in zip(stacks, payloads, ctxs, strict=True)
        ]

    def _stack(self, payloads: Sequence[Payload], ctx: TensorCtx) -> Tensor:
        with profiler_range("decompress"):
            return torch.stack([self.compressor.decompress(payload, ctx) for payload in payloads])

"""The Reducer: policy + feedback + aggregator, in the one legal order.

clip -> finite check -> compensate -> aggregate -> update. Users choose the parts, never the sequence.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .aggregators.health import are_finite, require_finite
from .aggregators.hierarchical import Hierarchical
from .aggregators.nodes import Nodes
from .aggregators.outcome import means_into
from .aggregators.residuals import (
    Outgoing,
    aggregate,
    carries_dense,
    compensate,
    update_feedback,
)
from .aggregators.stateless import Stateless
from .clipping import clip_coefficient, mean_norm, require_norm
from .feedback import NoFeedback, check_contraction
from .metrics import StepStats, profiler_range
from .policy import Policy
from .registry import spec
from .types import (
    RANK,
    Aggregator,
    Comm,
    Feedback,
    NonFiniteError,
    Preparable,
    StateDict,
    TensorCtx,
    parameter_of,
    section,
)

_STEP = "shared/step"
_AGGREGATOR = "aggregator"
_CARRIED = 1 << 18  # bytes; beyond, a collective of its own costs little


class Reducer:
    """Reduces named gradients to their mean over a group, through a compression scheme.

    One step is any number of :meth:`reduce` calls (DDP's buckets), each parameter at most once, and then
    :meth:`end_step`. If any rank holds an inf or NaN, every rank sends that reduction densely, so that a
    gradient scaler still sees it, and the whole step leaves residuals, Q and server state untouched.

    Args:
        aggregator: how payloads travel and are combined.
        feedback: what becomes of the part left unsent.
        policy: which tensors are compressed, and from which step on.
        seed: base of shared randomness; equal on all ranks.
        max_grad_norm: clip gradients before they are compressed. ``clip_grad_norm_`` comes after the
            reduction, and what arrives then through feedback holds parts of many gradients: to cut it is to
            lose them. All ranks shrink theirs by one coefficient, ``min(1, max_grad_norm / G)`` with
            ``G = sqrt(mean_i |g_i|^2)`` over all tensors of a reduction, dense ones too; G is at least the
            norm of the mean, so it clips more often than ``clip_grad_norm_``, by up to sqrt(W) where
            gradients are noise. One number more is sent, and nothing is hidden behind backward. 0 is off.

    Attributes:
        whole_step: the scheme must see all gradients of a step together (for their norm): adapters then
            call :meth:`reduce` once, after backward, which hides nothing of the communication.
        shards: where every tensor is a shard, the ranks that hold the other shards; norms are of whole tensors.
            Set by adapters.
        shapes: there, the shapes of the whole tensors by name: the policy decides by them, alike for all shards.
        compressed: names that were compressed in the step that :meth:`end_step` closed last.
        skipped: that step was not finite and has left no trace.

    Raises:
        TypeError: error feedback on a compressor or aggregator that it diverges on, or a feedback around a
            hierarchical aggregator.
        ValueError: a negative max_grad_norm.
    """

    whole_step = False

    def __init__(
        self,
        aggregator: Aggregator,
        feedback: Feedback | None = None,
        policy: Policy | None = None,
        seed: int = 0,
        max_grad_norm: float = 0.0,
    ) -> None:
        require_norm("max_grad_norm", max_grad_norm)
        self.aggregator = aggregator
        self.feedback: Feedback = NoFeedback() if feedback is None else feedback
        for part in (aggregator, getattr(aggregator, "compressor", None)):
            check_contraction(self.feedback, part, "feedback")
        if isinstance(aggregator, Hierarchical) and not isinstance(self.feedback, NoFeedback):
            raise TypeError(
                f"{type(self.feedback).__name__} around a hierarchical aggregator has nothing to keep: what is "
                "left unsent is the node's; use Hierarchical(aggregator, feedback=...) and no feedback outside"
            )
        self.max_grad_norm = max_grad_norm
        self.whole_step = max_grad_norm > 0 or bool(getattr(aggregator, "needs_whole_step", False))
        self.policy = Policy() if policy is None else policy
        self.seed = seed
        self.step = 0
        self.shards: Comm | None = None
        self.shapes: Mapping[str, torch.Size] = {}
        self.compressed: frozenset[str] = frozenset()
        self.skipped = False
        self._reduced: set[str] = set()
        self._compressed: set[str] = set()
        self._ok = True
        self._dense_bytes = 0
        self._contributors: int | None = None

    def put_between_nodes(self, local_size: int | None, nodes: Nodes | None) -> None:
        """From now on gradients are averaged inside each node in full precision, and the scheme works
        between nodes; see :class:`~commkit.aggregators.Hierarchical`, whose errors it raises."""
        self.aggregator = Hierarchical(self.aggregator, self.feedback, local_size, nodes)
        self.feedback = NoFeedback()

    def spec(self) -> dict[str, Any]:
        """The configuration as plain data; ranks compare it at attach."""
        parts = {"aggregator": self.aggregator, "feedback": self.feedback, "policy": self.policy}
        rest = {"seed": self.seed, "max_grad_norm": self.max_grad_norm}
        return {name: spec(part) for name, part in parts.items()} | rest

    def prepare(self, named: Mapping[str, Tensor], comm: Comm) -> None:
        """Set up and check what the aggregator can before the first reduction: groups of ranks, a setting
        that fits no tensor. Optional; collective over ``comm``, the one of all later reductions.

        Args:
            named: tensors like all the gradients to come.
            comm: the group.

        Raises:
            ValueError: on every rank together.
        """
        if isinstance(self.aggregator, Preparable):
            step = max(self.step, self.policy.start_step)
            ctxs = [replace(self._ctx(key, x), step=step) for key, x in named.items()]
            chosen = [c for c in ctxs if self.policy.compresses(self._whole(c))]
            self.aggregator.prepare(chosen, comm)

    def reduce(
        self, named: Mapping[str, Tensor], comm: Comm, hold: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """The mean of each tensor over ``comm``, in its shape and dtype.

        Args:
            named: gradients by parameter name; the same names, shapes and dtypes on every rank, in the
                same order. They are overwritten, and results are them or views of a copy.
            comm: the group.
            hold: names whose gradient on this rank is zero because the parameter was not used. They
                contribute zeros and their residual waits, since DDP may throw the result away. Ignored
                by feedback that sends differences to an estimate, which has to follow.

        Raises:
            RuntimeError: a name is reduced twice in a step.
        """
        self._begin(named)
        with profiler_range("clip"):
            self._clip(named, comm)
        return self._reduce(named, self.compresses(named), comm, hold)

    def compresses(self, named: Mapping[str, Tensor]) -> list[str]:
        """The names that this step's reduction compresses."""
        return [
            key
            for key, x in named.items()
            if self.policy.compresses(self._whole(self._ctx(key, x)))
        ]

    def _begin(self, named: Mapping[str, Tensor]) -> None:
        again = self._reduced.intersection(named)
        if again:
            raise RuntimeError(
                f"{min(again)!r} is reduced twice in step {self.step}; call end_step() after each step"
            )
        self._reduced.update(named)
        self._dense_bytes += sum(x.numel() * x.element_size() for x in named.values())

    def _clip(self, named: Mapping[str, Tensor], comm: Comm) -> None:
        if self.max_grad_norm:
            coefficient = clip_coefficient(mean_norm(named, comm, self.shards), self.max_grad_norm)
            if coefficient < 1:
                for x in named.values():
                    x.mul_(coefficient)

    def _reduce(
        self,
        named: Mapping[str, Tensor],
        compressed: Collection[str],
        comm: Comm,
        hold: Collection[str] = (),
    ) -> dict[str, Tensor]:
        if self.feedback.changes_mean:
            # An estimate of a gradient that is zero now must follow it: others go on using its mean.
            hold = ()
        ctxs = {key: self._ctx(key, x) for key, x in named.items()}
        dense = [key for key in named if key not in compressed]
        self._compressed.update(compressed)
        along = self._to_carry(dense, named) if compressed else {}
        if self._ok:
            for key in self._to_release(along, ctxs, hold):
                along[key] = self.feedback.release(named[key], key).to(named[key].dtype)
        with profiler_range("reduce"):
            try:
                results = self._reduce_compressed(compressed, named, ctxs, comm, hold, along)
            except NonFiniteError:
                self._ok = False
                dense, results, along = list(named), {}, {}
            alone = [key for key in dense if key not in along]
            if self._ok:
                for key in self._to_release(alone, ctxs, hold):
                    named[key].copy_(self.feedback.release(named[key], key))
            results.update(all_reduce_dense({key: named[key] for key in alone}, comm))
            if self._ok and self._stateful:
                self._ok = are_finite(results[key] for key in dense)
        if dense:
            self._contributed(comm.world_size)
        return results

    def end_step(self, keep: bool = True) -> StepStats:
        """Close the step: make its state changes real, or drop them if it was not finite.

        Args:
            keep: False drops them in any case: nobody will use the result.

        Returns:
            The step's statistics, as far as the reducer knows them.
        """
        self._ok = self._ok and keep
        self.feedback.commit(self._ok)
        self.aggregator.commit(self._ok)
        stats = StepStats(
            step=self.step,
            dense_bytes=self._dense_bytes,
            num_contributors=self._contributors or 0,
            nonfinite=not self._ok,
        )
        self.compressed, self.skipped = frozenset(self._compressed), not self._ok
        self.step += 1
        self._begin_step()
        return stats

    def abandon(self) -> None:
        """Give up the step under way as if it had never begun: after a failed reduction, to do it again."""
        step, skipped, compressed = self.step, self.skipped, self.compressed
        self.end_step(keep=False)
        self.step, self.skipped, self.compressed = step, skipped, compressed

    def forget(self, keys: Collection[str]) -> None:
        """Drop whatever is unsent of ``keys``: what is reduced under these names is another thing from now
        on. Call it on all ranks, before their reduction of a step."""
        for part in (self.feedback, self.aggregator):
            state = part.state_dict()
            kept = {key: value for key, value in state.items() if parameter_of(key) not in keys}
            if len(kept) < len(state):
                part.load_state_dict(kept)

    @property
    def finite(self) -> bool:
        """Whether the step that is under way was finite so far."""
        return self._ok

    @property
    def residual_norm(self) -> float:
        """2-norm of what feedback has left unsent on this rank; for a hierarchical scheme, of its node's
        residuals that this rank keeps."""
        if isinstance(self.aggregator, Hierarchical):
            return self.aggregator.feedback.norm()
        return self.feedback.norm()

    def state_dict(self) -> StateDict:
        """Plain tensors by key. The first part of a key says how states merge when the world size
        changes (``commkit.types``): ``rank/NAME`` is a residual, ``aggregator/...`` the aggregator's."""
        state = {f"{RANK}/{key}": value for key, value in self.feedback.state_dict().items()}
        for key, value in self.aggregator.state_dict().items():
            state[f"{_AGGREGATOR}/{key}"] = value
        state[_STEP] = torch.tensor(self.step)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace all state by ``state``, as saved by :meth:`state_dict` on this rank."""
        self.feedback.load_state_dict(section(state, RANK))
        self.aggregator.load_state_dict(section(state, _AGGREGATOR))
        self.step = int(state[_STEP])
        self._begin_step()

    def _begin_step(self) -> None:
        self._reduced.clear()
        self._compressed.clear()
        self._ok, self._dense_bytes, self._contributors = True, 0, None

    def _ctx(self, key: str, x: Tensor) -> TensorCtx:
        return TensorCtx(key, x.shape, x.dtype, x.device, self.step, self.seed)

    def _whole(self, ctx: TensorCtx) -> TensorCtx:
        shape = self.shapes.get(ctx.key)
        return ctx if shape is None else replace(ctx, shape=shape)

    def _reduce_compressed(
        self,
        keys: Collection[str],
        named: Mapping[str, Tensor],
        ctxs: Mapping[str, TensorCtx],
        comm: Comm,
        hold: Collection[str],
        along: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The means of ``keys``, and of ``along``, which travel uncompressed in the same messages."""
        if not keys:
            return {}
        dense, means = _joined(along) if along else (None, {})
        with profiler_range("compensate"):
            outgoing = [
                Outgoing(named[key].to(ctxs[key].work_dtype, copy=True))
                if key in hold
                else compensate(self.feedback, self.aggregator, named[key], ctxs[key])
                for key in keys
            ]
        with profiler_range("aggregate"):
            outcomes = aggregate(
                self.aggregator, outgoing, [ctxs[key] for key in keys], comm, dense
            )
        # A mean that fits float32 may not fit the gradient's dtype: then it cannot be delivered.
        with profiler_range("deliver"):
            ready = {
                key: self.feedback.deliver(outcome.mean, key).to(named[key].dtype)
                for key, outcome in zip(keys, outcomes, strict=True)
                if self.feedback.changes_mean or named[key].dtype != ctxs[key].work_dtype
            }
        require_finite(ready.values())
        self._contributed(min(outcome.num_contributors for outcome in outcomes))
        by_key = dict(zip(keys, zip(outgoing, outcomes, strict=True), strict=True))
        used = [key for key in keys if key not in hold]
        with profiler_range("update_feedback"):
            update_feedback(
                self.feedback, [by_key[k][0] for k in used], [by_key[k][1] for k in used], used
            )
        with profiler_range("deliver"):
            for key, x in ready.items():
                named[key].copy_(x)
            rest = [key for key in keys if key not in ready]
            means_into([by_key[key][1] for key in rest], [named[key] for key in rest])
        return {key: named[key] for key in keys} | means

    def _to_carry(self, dense: Sequence[str], named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of ``dense`` travels in the messages of what is compressed, alike on all ranks: nothing if there is much
        of it, which an all-reduce moves as well."""
        xs = {key: named[key] for key in dense if named[key].numel()}
        kinds = {(x.dtype, x.device) for x in xs.values()}
        size = sum(x.numel() * x.element_size() for x in xs.values())
        few = len(kinds) == 1 and size <= _CARRIED
        floats = all(x.is_floating_point() for x in xs.values())
        return xs if few and floats and carries_dense(self.aggregator) else {}

    def _to_release(
        self, dense: Collection[str], ctxs: Mapping[str, TensorCtx], hold: Collection[str]
    ) -> list[str]:
        """Tensors that are no longer compressed and take their residual with them."""
        return [
            key
            for key in dense
            if key not in hold
            and self.policy.releases(self._whole(ctxs[key]))
            and self.feedback.holds(key)
        ]

    @property
    def _stateful(self) -> bool:
        return not (
            isinstance(self.feedback, NoFeedback) and isinstance(self.aggregator, Stateless)
        )

    def _contributed(self, ranks: int) -> None:
        self._contributors = ranks if self._contributors is None else min(self._contributors, ranks)


def all_reduce_dense(named: Mapping[str, Tensor], comm: Comm) -> dict[str, Tensor]:
    """Plain mean, one all-reduce per dtype and device; in place where tensors lie back to back."""
    results: dict[str, Tensor] = {}
    filled = {key: x for key, x in named.items() if x.numel()}
    for kind in dict.fromkeys((x.dtype, x.device) for x in filled.values()):
        flat, parts = _joined({k: x for k, x in filled.items() if (x.dtype, x.device) == kind})
        # Divide first, as DDP does: a half-precision sum would overflow where the mean does not.
        comm.all_reduce(flat.div_(comm.world_size))
        results |= parts
    return {key: results.get(key, x) for key, x in named.items()}


def _joined(named: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """One flat tensor of all, of one dtype and device, and views of it in their shapes."""
    flat = _coalesce(list(named.values()))
    parts = flat.split_with_sizes([x.numel() for x in named.values()])
    return flat, {
        key: part.view(x.shape) for (key, x), part in zip(named.items(), parts, strict=True)
    }


def _coalesce(xs: list[Tensor]) -> Tensor:
    """One flat tensor of all: a view if they are contiguous neighbours in one storage, else a copy."""
    first = xs[0]
    offset = first.storage_offset()
    for x in xs:
        if (
            not x.is_contiguous()
            or x.storage_offset() != offset
            or (x.untyped_storage().data_ptr() != first.untyped_storage().data_ptr())
        ):
            return torch.cat([x.reshape(-1) for x in xs])
        offset += x.numel()
    return first.as_strided((offset - first.storage_offset(),), (1,))

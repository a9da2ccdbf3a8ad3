"""What a feedback does before an aggregation and with its outcome; the one place where both meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeGuard

from torch import Tensor

from ..addends import Addends, AddsResiduals, Debt
from ..feedback import ErrorFeedback, MomentumCorrection, NoFeedback
from ..ops import empty
from ..types import Aggregated, Aggregator, Comm, Compressor, Feedback, Payload, TensorCtx
from .all_gather import AllGather
from .outcome import Decoded, take_sent


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One tensor on its way to an aggregator.

    Args:
        delta: with what was left unsent before; of the fused path of momentum correction the gradient as it was.
        payload: made by that path, which has staged what it leaves unsent.
        addends: whose sum the aggregator writes to ``delta``.
    """

    delta: Tensor
    payload: Payload | None = None
    addends: Addends | None = None


def compensate(
    feedback: Feedback, aggregator: Aggregator | None, x: Tensor, ctx: TensorCtx
) -> Outgoing:
    """``feedback.compensate``, or more where feedback, compressor and aggregator have a fused path.
    No aggregator: ``x`` goes nowhere but to the feedback."""
    if isinstance(feedback, MomentumCorrection) and isinstance(aggregator, AllGather):
        payload = feedback.send(x, ctx.key, aggregator.compressor, ctx)
        if payload is not None:
            return Outgoing(x, payload)
    if isinstance(feedback, ErrorFeedback) and _adds(aggregator):
        addends = feedback.addends(x, ctx.key)
        if addends is not None:
            return Outgoing(empty(ctx.shape, ctx.work_dtype, ctx.device), addends=addends)
    return Outgoing(feedback.compensate(x, ctx.key))


def _adds(aggregator: Aggregator | None) -> TypeGuard[AddsResiduals]:
    # Of its class: one that only passes on what it does not know would be left out by a call of another name.
    known = hasattr(type(aggregator), "aggregate_sums")
    return known and bool(getattr(aggregator, "adds_residuals", False))


class CarriesDense(Protocol):
    """An aggregator whose messages have room for what is not compressed, which then needs no collective of its own."""

    carries_dense: ClassVar[bool]

    def aggregate_sums(
        self,
        sums: Sequence[Tensor],
        addends: Sequence[Addends | None],
        ctxs: Sequence[TensorCtx],
        comm: Comm,
        dense: Tensor | None,
    ) -> list[Aggregated]:
        """As of :class:`AddsResiduals`, without addends if there is no fused path. Of ``dense``, 1-D floats, the mean over
        the ranks takes the place; if this raises, they are as they were."""


def carries_dense(aggregator: object) -> TypeGuard[CarriesDense]:
    """Whether it does. Of its class: what only passes on what it does not know does not."""
    return bool(getattr(type(aggregator), "carries_dense", False))


def aggregate(
    aggregator: Aggregator,
    outgoing: Sequence[Outgoing],
    ctxs: Sequence[TensorCtx],
    comm: Comm,
    dense: Tensor | None = None,
) -> list[Aggregated]:
    """``aggregator.aggregate`` of what :func:`compensate` gave.

    Args:
        dense: see :class:`CarriesDense`, which the aggregator has to be then.
    """
    deltas, made = [each.delta for each in outgoing], [each.payload for each in outgoing]
    addends = [each.addends for each in outgoing]
    if dense is not None:
        assert carries_dense(aggregator)
        return aggregator.aggregate_sums(deltas, addends, ctxs, comm, dense)
    if _adds(aggregator):
        return aggregator.aggregate_sums(deltas, addends, ctxs, comm)
    if any(made):
        assert isinstance(aggregator, AllGather)
        return aggregator.aggregate(deltas, ctxs, comm, made)
    return aggregator.aggregate(deltas, ctxs, comm)


def update_feedback(
    feedback: Feedback,
    outgoing: Sequence[Outgoing],
    outcomes: Sequence[Aggregated],
    keys: Sequence[str],
) -> None:
    """Stage what each of ``outcomes`` left unsent of ``outgoing``, which may be overwritten: without forming what
    was sent, where feedback and aggregator can."""
    if isinstance(feedback, NoFeedback):
        return
    pairs = list(zip(outgoing, outcomes, strict=True))
    if isinstance(feedback, ErrorFeedback):
        now = []
        for key, (each, outcome) in zip(keys, pairs, strict=True):
            debt = _debt(each, outcome)
            if debt is None:
                now.append((key, each.delta, outcome))
            else:
                feedback.stage(key, each.delta, debt)
        taken = take_sent([outcome for *_, outcome in now], [delta for _, delta, _ in now])
        for (key, delta, outcome), done in zip(now, taken, strict=True):
            if done:
                feedback.stage(key, delta)
            else:
                feedback.update(delta, outcome.sent, key)
        return
    for key, (each, outcome) in zip(keys, pairs, strict=True):
        if each.payload is None:
            _update_one(feedback, each.delta, outcome, key)


def _debt(sent: Outgoing, outcome: Aggregated) -> Debt | None:
    # Where there was no fused path in this step, there will hardly be one in the next.
    return outcome.debt() if sent.addends is not None and isinstance(outcome, Decoded) else None


def _update_one(feedback: Feedback, delta: Tensor, outcome: Aggregated, key: str) -> None:
    places = outcome.sent_places() if isinstance(feedback, MomentumCorrection) else None
    if places is not None and outcome.take_sent_from(delta):
        assert isinstance(feedback, MomentumCorrection)
        feedback.stage(key, delta, places)
    else:
        feedback.update(delta, outcome.sent, key)


def update_with_payloads(
    feedback: Feedback,
    deltas: Sequence[Tensor],
    compressor: Compressor,
    payloads: Sequence[Payload],
    ctxs: Sequence[TensorCtx],
) -> None:
    """Stage what each of ``payloads`` leaves unsent of ``deltas``, which may be overwritten."""
    if isinstance(feedback, NoFeedback):
        return
    if isinstance(feedback, ErrorFeedback) and all(delta.is_contiguous() for delta in deltas):
        compressor.subtract_each_([delta.view(-1) for delta in deltas], payloads, ctxs)
        for delta, ctx in zip(deltas, ctxs, strict=True):
            feedback.stage(ctx.key, delta)
        return
    for delta, payload, ctx in zip(deltas, payloads, ctxs, strict=True):
        feedback.update(delta, compressor.decompress(payload, ctx), ctx.key)

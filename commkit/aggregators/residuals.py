"""What a feedback does before an aggregation and with its outcome; the one place where both meet."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from torch import Tensor

from ..feedback import ErrorFeedback, MomentumCorrection, NoFeedback
from ..ops import empty
from ..types import (
    AddsResiduals,
    Aggregated,
    Aggregator,
    Comm,
    CompressesSums,
    Compressor,
    Feedback,
    Payload,
    TensorCtx,
)
from .all_gather import AllGather
from .outcome import take_sent
from .summing import compress_sums


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One tensor on its way to an aggregator.

    Args:
        delta: with what was left unsent before; of the fused path of momentum correction the gradient as it was.
        payload: made by that path, which has staged what it leaves unsent.
        addends: residual and gradient, whose sum the aggregator writes to ``delta``.
    """

    delta: Tensor
    payload: Payload | None = None
    addends: tuple[Tensor, Tensor] | None = None


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
        residual = feedback.addend(x, ctx.key)
        if residual is not None:
            delta = empty(ctx.shape, ctx.work_dtype, ctx.device)
            return Outgoing(delta, addends=(residual, x))
    return Outgoing(feedback.compensate(x, ctx.key))


def _adds(aggregator: Aggregator | None) -> TypeGuard[AddsResiduals]:
    # Of its class: one that only passes on what it does not know would be left out by a call of another name.
    known = hasattr(type(aggregator), "aggregate_sums")
    return known and bool(getattr(aggregator, "adds_residuals", False))


def aggregate(
    aggregator: Aggregator, outgoing: Sequence[Outgoing], ctxs: Sequence[TensorCtx], comm: Comm
) -> list[Aggregated]:
    """``aggregator.aggregate`` of what :func:`compensate` gave."""
    deltas, made = [each.delta for each in outgoing], [each.payload for each in outgoing]
    if _adds(aggregator):
        return aggregator.aggregate_sums(deltas, [each.addends for each in outgoing], ctxs, comm)
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
    if isinstance(feedback, ErrorFeedback):
        taken = take_sent(outcomes, [each.delta for each in outgoing])
        for key, sent, outcome, done in zip(keys, outgoing, outcomes, taken, strict=True):
            if done:
                feedback.stage(key, sent.delta)
            else:
                feedback.update(sent.delta, outcome.sent, key)
        return
    for key, sent, outcome in zip(keys, outgoing, outcomes, strict=True):
        if sent.payload is None:
            _update_one(feedback, sent.delta, outcome, key)


def _update_one(feedback: Feedback, delta: Tensor, outcome: Aggregated, key: str) -> None:
    places = outcome.sent_places() if isinstance(feedback, MomentumCorrection) else None
    if places is not None and outcome.take_sent_from(delta):
        assert isinstance(feedback, MomentumCorrection)
        feedback.stage(key, delta, places)
    else:
        feedback.update(delta, outcome.sent, key)


def compress_own(
    feedback: Feedback,
    compressor: Compressor,
    xs: Sequence[Tensor],
    used: Collection[int],
    ctxs: Sequence[TensorCtx],
    salt: int,
) -> list[Payload]:
    """``compress_each`` of ``xs``, contiguous and of the work dtype, of which those that are ``used`` become what
    ``feedback.compensate`` makes of them, in their own memory."""
    addends: list[tuple[Tensor, Tensor] | None] = [None] * len(xs)
    fused = isinstance(compressor, CompressesSums)
    for i in used:
        x, key = xs[i], ctxs[i].key
        if isinstance(feedback, ErrorFeedback):
            residual = feedback.addend(x, key) if fused else None
            if residual is not None:
                addends[i] = x, residual
            else:
                feedback.compensate_(x, key)
        elif not isinstance(feedback, NoFeedback):
            x.copy_(feedback.compensate(x, key))
    return compress_sums(compressor, xs, addends, ctxs, salt)


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

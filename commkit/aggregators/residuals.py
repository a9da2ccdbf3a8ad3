"""What a feedback does before an aggregation and with its outcome; the one place where both meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..feedback import ErrorFeedback, MomentumCorrection, NoFeedback
from ..types import Aggregated, Aggregator, Comm, Compressor, Feedback, Payload, TensorCtx
from .all_gather import AllGather
from .outcome import take_sent


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One tensor on its way to an aggregator.

    Args:
        delta: with what was left unsent before; of a fused path the gradient as it was.
        payload: made by a fused path, which has staged what that leaves unsent.
    """

    delta: Tensor
    payload: Payload | None = None


def compensate(
    feedback: Feedback, aggregator: Aggregator | None, x: Tensor, ctx: TensorCtx
) -> Outgoing:
    """``feedback.compensate``, or more where feedback, compressor and aggregator have a fused path.
    No aggregator: ``x`` goes nowhere but to the feedback."""
    if isinstance(feedback, MomentumCorrection) and isinstance(aggregator, AllGather):
        payload = feedback.send(x, ctx.key, aggregator.compressor, ctx)
        if payload is not None:
            return Outgoing(x, payload)
    return Outgoing(feedback.compensate(x, ctx.key))


def aggregate(
    aggregator: Aggregator, outgoing: Sequence[Outgoing], ctxs: Sequence[TensorCtx], comm: Comm
) -> list[Aggregated]:
    """``aggregator.aggregate`` of what :func:`compensate` gave."""
    deltas, made = [each.delta for each in outgoing], [each.payload for each in outgoing]
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


def compensate_own(feedback: Feedback, x: Tensor, key: str) -> Tensor:
    """``feedback.compensate`` of an ``x`` of the work dtype that may be overwritten."""
    if isinstance(feedback, ErrorFeedback):
        return feedback.compensate_(x, key)
    return feedback.compensate(x, key)


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

"""What a feedback does with the outcome of an aggregation; the one place where both meet."""

from __future__ import annotations

from torch import Tensor

from ..feedback import ErrorFeedback, MomentumCorrection, NoFeedback
from ..types import Aggregated, Compressor, Feedback, Payload, TensorCtx


def update_feedback(feedback: Feedback, delta: Tensor, outcome: Aggregated, key: str) -> None:
    """Stage what ``outcome`` left unsent of ``delta``, which may be overwritten: without forming what was
    sent, where feedback and aggregator can."""
    if isinstance(feedback, NoFeedback):
        return
    if isinstance(feedback, ErrorFeedback) and outcome.take_sent_from(delta):
        feedback.stage(key, delta)
        return
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


def update_with_payload(
    feedback: Feedback, delta: Tensor, compressor: Compressor, payload: Payload, ctx: TensorCtx
) -> None:
    """Stage what ``payload`` leaves unsent of ``delta``, which may be overwritten."""
    if isinstance(feedback, NoFeedback):
        return
    if isinstance(feedback, ErrorFeedback) and delta.is_contiguous():
        compressor.subtract_(delta.view(-1), payload, ctx)
        feedback.stage(ctx.key, delta)
    else:
        feedback.update(delta, compressor.decompress(payload, ctx), ctx.key)

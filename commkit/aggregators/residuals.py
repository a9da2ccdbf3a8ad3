"""What a feedback does with the outcome of an aggregation; the one place where both meet."""

from __future__ import annotations

from torch import Tensor

from ..feedback import ErrorFeedback, NoFeedback
from ..types import Aggregated, Feedback


def update_feedback(feedback: Feedback, delta: Tensor, outcome: Aggregated, key: str) -> None:
    """Stage what ``outcome`` left unsent of ``delta``, which may be overwritten: without forming what was
    sent, where feedback and aggregator can."""
    if isinstance(feedback, NoFeedback):
        return
    if isinstance(feedback, ErrorFeedback) and outcome.take_sent_from(delta):
        feedback.stage(key, delta)
    else:
        feedback.update(delta, outcome.sent, key)

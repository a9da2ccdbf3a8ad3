"""Which feedbacks need a code that loses less than it is given."""

from __future__ import annotations

from ..types import Feedback


def check_contraction(feedback: Feedback, part: object, field: str) -> None:
    """Refuse a feedback that carries errors on, on a part (compressor or aggregator) where they would grow.

    Raises:
        TypeError: ``feedback`` needs a contraction, and ``part`` says that it is none.
    """
    if feedback.needs_contraction and not getattr(part, "allows_error_feedback", True):
        raise TypeError(
            f"{field} {type(feedback).__name__} diverges on {type(part).__name__}, whose errors may be as large "
            f"as its input (allows_error_feedback=False); use {field}='none', or a compressor that loses less, "
            "for example sign, topk or block_quantize"
        )

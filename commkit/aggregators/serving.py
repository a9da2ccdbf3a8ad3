"""The owner's half of a two-shot reduction: combine what the ranks sent of each shard, and compress the mean again."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..addends import AddendsPart, compresses_sums, debt_of
from ..feedback import ErrorFeedback, NoFeedback
from ..metrics import profiler_range
from ..ops import empty
from ..types import Compressor, Feedback, Payload, TensorCtx
from .residuals import update_with_payloads

_FIRST = 1024  # elements, one of which is hardly ever not zero


def serve(
    feedback: Feedback,
    compressor: Compressor,
    received: Sequence[Sequence[Payload]],
    ctxs: Sequence[TensorCtx],
    salt: int,
) -> list[Payload]:
    """The payloads of the means, with what ``feedback`` has left unsent before, and stages what they leave.

    Args:
        received: of each shard, what each rank sent.
        ctxs: of the shards.
        salt: of the second compression.
    """
    sums = [empty((ctx.numel,), ctx.work_dtype, ctx.device) for ctx in ctxs]
    parts = _fused_parts(feedback, compressor, received, sums, ctxs)
    apart = [i for i in range(len(ctxs)) if i not in parts]
    made = _serve_apart(
        feedback,
        compressor,
        [received[i] for i in apart],
        [sums[i] for i in apart],
        [ctxs[i] for i in apart],
        salt,
    )
    payloads = dict(zip(apart, made, strict=True))
    if parts:
        fused = compressor
        assert compresses_sums(fused)
        assert isinstance(feedback, ErrorFeedback)
        with profiler_range("compress"):
            made = fused.compress_means(
                [sums[i] for i in parts],
                [part.residual for part in parts.values()],
                [part.sent for part in parts.values()],
                [received[i] for i in parts],
                [ctxs[i] for i in parts],
                salt,
            )
        payloads |= zip(parts, made, strict=True)
        now = []
        for i in parts:
            debt = debt_of(compressor, {0: payloads[i]})
            if debt is None:
                now.append(i)
            else:
                feedback.stage(ctxs[i].key, sums[i], debt)
        update_with_payloads(
            feedback,
            [sums[i] for i in now],
            compressor,
            [payloads[i] for i in now],
            [ctxs[i] for i in now],
        )
    return [payloads[i] for i in range(len(ctxs))]


def _fused_parts(
    feedback: Feedback,
    compressor: Compressor,
    received: Sequence[Sequence[Payload]],
    sums: Sequence[Tensor],
    ctxs: Sequence[TensorCtx],
) -> dict[int, AddendsPart]:
    """What is added, but for the means, in one pass that decodes, adds and compresses: by the number of its shard."""
    if not (isinstance(feedback, ErrorFeedback) and compresses_sums(compressor)):
        return {}
    parts = {}
    for i, idle in enumerate(compressor.nothing_sent(received)):
        # In the place of the mean, which never is in memory, stands what has its shape.
        addends = None if idle else feedback.addends(sums[i], ctxs[i].key)
        if addends is not None:
            (parts[i],) = addends.parts([(0, ctxs[i].numel)])
    return parts


def _serve_apart(
    feedback: Feedback,
    compressor: Compressor,
    received: Sequence[Sequence[Payload]],
    means: Sequence[Tensor],
    ctxs: Sequence[TensorCtx],
    salt: int,
) -> list[Payload]:
    """Part by part, in the memory of ``means``."""
    with profiler_range("decompress"):
        compressor.combine_each_into(means, received, ctxs)
    # Nobody sent anything: nobody may use the answer either, so the residual waits.
    used = [i for i, mean in enumerate(means) if bool(mean[:_FIRST].any()) or bool(mean.any())]
    with profiler_range("compress"):
        for i in used:
            if isinstance(feedback, ErrorFeedback):
                feedback.compensate_(means[i], ctxs[i].key)
            elif not isinstance(feedback, NoFeedback):
                means[i].copy_(feedback.compensate(means[i], ctxs[i].key))
        payloads = compressor.compress_each(means, ctxs, salt)
    update_with_payloads(
        feedback,
        [means[i] for i in used],
        compressor,
        [payloads[i] for i in used],
        [ctxs[i] for i in used],
    )
    return payloads

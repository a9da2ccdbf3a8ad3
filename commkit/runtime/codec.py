"""Tensors of a model on their way through a transport: compressed on one end, decoded on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..aggregators.residuals import update_with_payloads
from ..feedback import ErrorFeedback, NoFeedback, check_contraction
from ..metrics import profiler_range
from ..policy import Policy
from ..types import Compressor, Feedback, TensorCtx

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Codec:
    """The format that both ends know. Everything is encoded and decoded on the CPU, where messages are anyway
    and where both ends get the same bits.

    Args:
        compressor: any; None sends everything in full.
        policy: what is compressed.
        seed: base of shared randomness.
        like: tensors with shapes and dtypes of the parameters, by name.
    """

    compressor: Compressor | None
    policy: Policy
    seed: int
    like: Mapping[str, Tensor]

    def encode(
        self,
        delta: Mapping[str, Tensor],
        names: Sequence[str],
        task: int,
        salt: int,
        feedback: Feedback,
    ) -> list[Tensor]:
        """The tensors that carry ``delta`` of parameters ``names``; what they leave unsent is staged in
        ``feedback``.

        Args:
            delta: float32 (or float64), by parameter name; may be overwritten.
            task: a number that both ends know, from which shared randomness comes.
            salt: the sender's rank, for rounding of its own.
        """
        counts: list[int] = []
        payloads: list[Tensor] = []
        for name in names:
            ctx, x = self._ctx(name, task), delta[name].to(_CPU)
            compressor = self.compressor
            if compressor is not None and self.policy.compresses(ctx):
                x = feedback.compensate(x, name)
                with profiler_range("compress"):
                    payload = compressor.compress(x, ctx, salt)
                update_with_payloads(feedback, [x], compressor, [payload], [ctx])
            else:
                if feedback.holds(name):
                    x = feedback.release(x, name)
                payload = (x.contiguous(),)
            counts.append(len(payload))
            payloads += payload
        return [torch.tensor(counts, dtype=torch.int64), *payloads]

    def decode(
        self, tensors: Sequence[Tensor], names: Sequence[str], task: int
    ) -> dict[str, Tensor]:
        """What was sent, by parameter name: exactly what the sender has left out of its residual.

        Raises:
            ValueError, IndexError: no message that :meth:`encode` makes of these parameters.
        """
        counts, decoded, at = tensors[0].tolist(), {}, 1
        if (
            len(counts) != len(names)
            or min(counts, default=0) < 0
            or sum(counts) + 1 != len(tensors)
        ):
            raise ValueError(
                f"a message of {len(tensors)} tensors says that it has {counts} of {len(names)} parameters"
            )
        for name, count in zip(names, counts, strict=True):
            ctx, payload = self._ctx(name, task), tuple(tensors[at : at + count])
            at += count
            compressor = self.compressor
            if compressor is not None and self.policy.compresses(ctx):
                with profiler_range("decompress"):
                    decoded[name] = compressor.decompress(payload, ctx)
            else:
                decoded[name] = _whole(payload, ctx)
        return decoded

    def compresses(self, name: str, task: int) -> bool:
        """Whether parameter ``name`` is compressed in ``task``, or sent in full."""
        return self.compressor is not None and self.policy.compresses(self._ctx(name, task))

    def feedback(self, chosen: Feedback | None) -> Feedback:
        """``chosen`` if it fits, or what fits: error feedback, unless nothing is lost or it would diverge.

        Raises:
            TypeError: ``chosen`` does not fit the compressor or the server.
        """
        compressor = self.compressor
        if chosen is None:
            keeps = compressor is not None and compressor.allows_error_feedback
            return ErrorFeedback() if keeps else NoFeedback()
        if chosen.changes_mean:
            raise TypeError(
                f"feedback {type(chosen).__name__} sends differences to an estimate, of which the server would need "
                "one per worker; use error_feedback"
            )
        if compressor is None and not isinstance(chosen, NoFeedback):
            raise TypeError(
                f"feedback {type(chosen).__name__} has nothing to keep: nothing is left unsent without a compressor"
            )
        check_contraction(chosen, compressor, "feedback")
        return chosen

    def _ctx(self, name: str, task: int) -> TensorCtx:
        like = self.like[name]
        dtype = torch.promote_types(like.dtype, torch.float32)
        return TensorCtx(name, like.shape, dtype, _CPU, task, self.seed)


def _whole(payload: Sequence[Tensor], ctx: TensorCtx) -> Tensor:
    if len(payload) != 1 or payload[0].shape != ctx.shape or payload[0].dtype != ctx.dtype:
        got = [(tuple(x.shape), x.dtype) for x in payload]
        raise ValueError(
            f"a message has {got} of {ctx.key}, and must have one tensor of {tuple(ctx.shape)} {ctx.dtype}"
        )
    return payload[0]


def divided(like: Mapping[str, Tensor], parts: int) -> list[list[str]]:
    """Parameter names in ``parts`` lists of about as many elements: largest first, each to the list that has the
    least. Inside a list they keep their order."""
    lists: list[list[str]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for name in sorted(like, key=lambda n: -like[n].numel()):
        lightest = loads.index(min(loads))
        lists[lightest].append(name)
        loads[lightest] += like[name].numel()
    order = {name: place for place, name in enumerate(like)}
    return [sorted(names, key=order.__getitem__) for names in lists]

"""What a worker's compressor left unsent, and what becomes of vectors whose fate is not known yet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..feedback import ErrorFeedback
from ..runtime.codec import Codec
from ..types import Feedback


class Residuals:
    """One residual per model, or, where several jobs of one model are under way, per job of T + 1 in turn.

    A round's vectors are staged when they are sent. In time, what they left unsent becomes the residual. Too late:
    with ``keep`` all of it does, as if nothing had been sent; without, the round leaves no trace.

    Args:
        codec: of the gradients.
        count: T + 1.
        keep: see above.
    """

    def __init__(self, codec: Codec, count: int, keep: bool) -> None:
        self.codec, self.keeps = codec, keep
        chosen = codec.feedback(None)
        if keep and codec.compressor is None:
            chosen = ErrorFeedback()
        self.feedbacks: list[Feedback] = [type(chosen)() for _ in range(count)]
        if keep and not isinstance(chosen, ErrorFeedback):
            raise TypeError(
                f"keep_dropped=True needs a residual, but {type(codec.compressor).__name__} keeps none "
                "(allows_error_feedback=False); set keep_dropped=False, or use another compressor"
            )
        self._round = -1
        self._jobs: list[int] = []
        self._sent: list[tuple[int, Sequence[str], list[Tensor]]] = []  # place, names, tensors

    def stage(self, number: int, jobs: Sequence[int]) -> None:
        """The vectors of round ``number``, of these jobs, are about to be sent."""
        self._round, self._jobs, self._sent = number, list(jobs), []

    def encode(
        self, place: int, vector: Mapping[str, Tensor], names: Sequence[str], salt: int
    ) -> list[Tensor]:
        """What carries parameters ``names`` of the vector of job ``jobs[place]``."""
        tensors = self.codec.encode(vector, names, self._round, salt, self._of(place))
        if self.keeps:
            self._sent.append((place, names, tensors))
        return tensors

    def settle(self, in_time: bool) -> None:
        """What became of the vectors that were staged."""
        for feedback in self.feedbacks:
            feedback.commit(in_time or self.keeps)
        if self.keeps and not in_time:
            for place, names, tensors in self._sent:
                self._put_back(place, self.codec.decode(tensors, names, self._round))
        self._sent = []

    def refuse(self) -> None:
        """They were not finite: nothing has happened."""
        for feedback in self.feedbacks:
            feedback.commit(False)
        self._sent = []

    def keep(
        self, number: int, jobs: Sequence[int], vectors: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Vectors that came too late to be sent at all."""
        if not self.keeps:
            return
        self.stage(number, jobs)
        for place, vector in enumerate(vectors):
            if all(bool(x.isfinite().all()) for x in vector.values()):
                self._put_back(place, {name: x.to("cpu") for name, x in vector.items()})

    def norm(self) -> float:
        """2-norm of everything left unsent on this rank."""
        return math.hypot(*(feedback.norm() for feedback in self.feedbacks))

    def tensors(self) -> list[Tensor]:
        return [x for feedback in self.feedbacks for x in feedback.state_dict().values()]

    def state_dict(self) -> dict[str, Any]:
        return {str(slot): feedback.state_dict() for slot, feedback in enumerate(self.feedbacks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: the state is of another number of jobs under way.
        """
        if len(state) != len(self.feedbacks):
            raise ValueError(
                f"the state has {len(state)} residuals but {len(self.feedbacks)} jobs are under way at a time; resume "
                "with the scheme that saved it"
            )
        for slot, feedback in enumerate(self.feedbacks):
            feedback.load_state_dict(state[str(slot)])

    def _of(self, place: int) -> Feedback:
        return self.feedbacks[self._jobs[place] % len(self.feedbacks)]

    def _put_back(self, place: int, sent: Mapping[str, Tensor]) -> None:
        feedback = self._of(place)
        for name, x in sent.items():
            whole = feedback.compensate(x, name)
            feedback.update(whole, torch.zeros_like(whole), name)
        feedback.commit(True)

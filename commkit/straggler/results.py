"""What workers have sent and no job has used yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..runtime.codec import Codec

Key: TypeAlias = tuple[int, int, int]
"""(job, worker, index): the name of a result."""


class Result(NamedTuple):
    """One vector as it came.

    Args:
        number: of the round in which it was sent.
        tensors: that carry it.
        loss: coded as the vector is.
    """

    number: int
    tensors: tuple[Tensor, ...]
    loss: float


class Results:
    """A coordinator's part of what arrived in time, until its job is finished.

    Coded vectors are kept as they came and decoded when their weights are known; others are added up at once,
    so that one tensor per parameter is in memory, however many they are.

    Args:
        codec: of the gradients.
        names: the parameters of this part.
    """

    def __init__(self, codec: Codec, names: Sequence[str]) -> None:
        self.codec, self.names = codec, list(names)
        self._kept: dict[Key, Result] = {}
        self._sums: dict[int, dict[str, Tensor]] = {}
        self._losses: dict[int, float] = {}  # of what was added up

    def keep(self, key: Key, result: Result) -> None:
        self._kept[key] = result

    def add(self, key: Key, result: Result) -> None:
        """A result that enters its job's sum as it is."""
        job = key[0]
        self._add(self._sums.setdefault(job, {}), self._decoded(result), 1.0)
        self._losses[job] = self._losses.get(job, 0.0) + result.loss

    def combine(
        self, job: int, weights: Mapping[tuple[int, int], float]
    ) -> tuple[dict[str, Tensor], list[list[float]]]:
        """The weighted sum in the order of ``weights``, after what was added up already, and of each vector that was
        kept and has a weight the square of its 2-norm for each name."""
        total = self._sums.get(job, {})
        norms = []
        for (worker, index), weight in weights.items():
            result = self._kept.get((job, worker, index))
            if result is None:
                continue  # added up already
            decoded = self._decoded(result)
            norms.append([squared(decoded[name]) for name in self.names])
            self._add(total, decoded, weight)
        return total, norms

    def loss(self, job: int, weights: Mapping[tuple[int, int], float]) -> float:
        """The mean over the job's samples, put together as its gradient is."""
        loss = self._losses.get(job, 0.0)
        for (worker, index), weight in weights.items():
            result = self._kept.get((job, worker, index))
            if result is not None:
                loss += weight * result.loss
        return loss

    def forget(self, job: int) -> None:
        """The job is finished, or given up."""
        for key in [key for key in self._kept if key[0] == job]:
            del self._kept[key]
        self._sums.pop(job, None)
        self._losses.pop(job, None)

    def clear(self) -> None:
        self._kept.clear()
        self._sums.clear()
        self._losses.clear()

    def state_dict(self) -> dict[str, Any]:
        """What came is copied: its tensors of several dtypes share the memory of a message, which no file can hold."""
        return {
            "kept": [
                [*key, x.number, [t.clone() for t in x.tensors], x.loss]
                for key, x in self._kept.items()
            ],
            "sums": [[job, dict(sums)] for job, sums in self._sums.items()],
            "losses": [[job, loss] for job, loss in self._losses.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.clear()
        for job, worker, index, number, tensors, loss in state["kept"]:
            self._kept[job, worker, index] = Result(number, tuple(tensors), loss)
        for job, sums in state["sums"]:
            self._sums[job] = {name: x.clone() for name, x in sums.items()}
        self._losses = {job: loss for job, loss in state["losses"]}

    def _decoded(self, result: Result) -> dict[str, Tensor]:
        return self.codec.decode(result.tensors, self.names, result.number)

    @staticmethod
    def _add(total: dict[str, Tensor], decoded: Mapping[str, Tensor], weight: float) -> None:
        for name, x in decoded.items():
            if name in total:
                total[name].add_(x, alpha=weight)
            else:
                total[name] = x * weight


def squared(x: Tensor) -> float:
    """The square of the 2-norm, in float64."""
    return float(torch.linalg.vector_norm(x.detach(), dtype=torch.float64)) ** 2

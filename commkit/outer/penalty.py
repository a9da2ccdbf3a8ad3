"""The pseudo-gradient penalty of EDiT: which replicas count, and how much, layer by layer.

Pure arithmetic over norms. ``inf`` is the norm of what does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..types import StateDict


@dataclass(frozen=True, slots=True)
class Penalty:
    """
    Args:
        warm_rounds: rounds of a layer before anything can be anomalous, and the number of recent z-scores
            whose spread widens the threshold. The authors' configuration has 120, their small example 10:
            take a tenth of all rounds, at least 10, for an estimate of the spread from fewer means little.
        ewma: weight of the newest norm in the running mean and variance. 0.02 remembers about 50 rounds;
            raise it where norms fall fast, lower it where they are noisy.
        threshold: in standard deviations above the mean (never below: small norms are harmless). 3 in the
            paper. Lower rejects more; a healthy run should reject almost nothing (``EDiT.rejected``).
        weighting: "absolute" is the paper's ``softmax(-norm / temperature)``, whose effect depends on the
            scale of the norms: with norms of 0.01 weights are equal, with norms of 100 one replica takes all.
            "relative" divides by the mean norm first and is free of scale. "none" weighs equally all
            that is not anomalous.
        temperature: large makes weights equal, small favours the smallest pseudo-gradient. 1 in the paper.
        clip: largest 2-norm of a layer's combined pseudo-gradient; None does not clip. The authors say 1 or
            10. It is to catch spikes: well above the norms of a healthy run.

    Raises:
        ValueError: a value out of range.
    """

    warm_rounds: int = 120
    ewma: float = 0.02
    threshold: float = 3.0
    weighting: Literal["absolute", "relative", "none"] = "absolute"
    temperature: float = 1.0
    clip: float | None = 10.0

    def __post_init__(self) -> None:
        if self.warm_rounds < 1:
            raise ValueError(f"warm_rounds={self.warm_rounds} must be >= 1; use 10 to 120")
        if not 0 < self.ewma <= 1:
            raise ValueError(f"ewma={self.ewma} must be in (0, 1]; use 0.02")
        if not self.threshold > 0:
            raise ValueError(
                f"threshold={self.threshold} must be > 0; use 3, or float('inf') to reject only "
                "what is not finite"
            )
        if self.weighting not in ("absolute", "relative", "none"):
            raise ValueError(
                f"weighting={self.weighting!r} must be 'absolute', 'relative' or 'none'"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be > 0; use 1")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip={self.clip} must be > 0; use 10, or None not to clip")

    def weights(self, norms: Tensor, base: Tensor) -> Tensor:
        """What each replica's pseudo-gradient counts for, layer by layer (equation 3.6).

        Args:
            norms: (replicas, layers) float64; inf for what does not count.
            base: (replicas,) float64 >= 0: the weights if all norms were equal.

        Returns:
            (replicas, layers) float64. Each layer's sum to 1, or are all 0 where nothing counts.
        """
        counts = norms.isfinite() & (base > 0)[:, None]
        norms = norms.where(counts, torch.inf)
        scores = torch.zeros_like(norms)
        if self.weighting != "none":
            scale = torch.full_like(norms[:1], self.temperature)
            if self.weighting == "relative":
                total = norms.where(counts, 0.0).sum(0, keepdim=True)
                scale = scale * total / counts.sum(0, keepdim=True).clamp(min=1)
            excess = (norms - norms.amin(0, keepdim=True)).where(counts, 0.0)
            scores = (excess / scale).where(excess > 0, 0.0)
        return shares(torch.exp(-scores) * base[:, None], counts)

    def shrink(self, norm: Tensor) -> Tensor:
        """0-d factor that brings a combined pseudo-gradient of 2-norm ``norm`` down to ``clip`` (equation 3.9)."""
        if self.clip is None:
            return torch.ones_like(norm)
        return (self.clip / norm).clamp(max=1.0)


PAPER = Penalty()


def shares(weights: Tensor, counts: Tensor) -> Tensor:
    """``weights`` (replicas, layers) of those that count, scaled to sum to 1 in each layer where anything does."""
    weights = weights.where(counts, 0.0)
    total = weights.sum(0, keepdim=True)
    return (weights / total).where(total > 0, 0.0)


class Detectors:
    """One detector of anomalous norms per replica and layer: equations (3.3) to (3.5).

    A norm is anomalous if it lies more than ``threshold * max(1, spread)`` standard deviations above the
    running mean of that replica's layer, ``spread`` being the standard deviation of its recent z-scores.
    The first norm starts the mean. Anomalies never enter the statistics: fed once, a spike would raise the mean
    so far that no later one is found.

    Args:
        replicas: how many.
        layers: how many.
        penalty: the knobs.
    """

    def __init__(self, replicas: int, layers: int, penalty: Penalty) -> None:
        self._penalty = penalty
        self._mean = torch.zeros(replicas, layers, dtype=torch.float64)
        self._variance = torch.zeros_like(self._mean)
        self._count = torch.zeros(replicas, layers, dtype=torch.int64)
        # Recent z-scores, a ring; NaN where there are none yet.
        self._recent = torch.full(
            (replicas, layers, penalty.warm_rounds), torch.nan, dtype=torch.float64
        )

    def accepts(self, replica: int, norms: Tensor) -> Tensor:
        """Which of ``norms`` (layers,) of ``replica`` are finite and not anomalous: (layers,) bool. Changes
        nothing."""
        z = _z(norms, self._mean[replica], self._variance[replica])
        limit = self._penalty.threshold * _spread(self._recent[replica]).clamp(min=1.0)
        warm = self._count[replica] >= self._penalty.warm_rounds
        return norms.isfinite() & ~(warm & (z > limit))

    def feed(self, norms: Tensor) -> None:
        """Take in accepted norms, (replicas, layers); what is not finite is no observation."""
        seen = norms.isfinite()
        a = self._penalty.ewma
        before = norms.where(self._count == 0, self._mean)
        mean = before + a * (norms - before)
        variance = (1 - a) * (self._variance + a * (norms - before) * (norms - mean))
        self._mean = mean.where(seen, self._mean)
        self._variance = variance.where(seen, self._variance)
        z = _z(norms, self._mean, self._variance)
        place = (self._count % self._penalty.warm_rounds)[..., None]
        old = self._recent.gather(2, place)
        self._recent.scatter_(2, place, z[..., None].where(seen[..., None], old))
        self._count += seen

    def of(self, replicas: Iterable[int]) -> Detectors:
        """Detectors of ``replicas`` in that order; new ones where there were none."""
        chosen = list(replicas)
        made = Detectors(len(chosen), self._mean.shape[1], self._penalty)
        for place, replica in enumerate(chosen):
            if replica < len(self._mean):
                for new, old in zip(made._tensors(), self._tensors(), strict=True):
                    new[place] = old[replica]
        return made

    def state_dict(self) -> StateDict:
        names = ("mean", "variance", "count", "recent")
        return {name: x.clone() for name, x in zip(names, self._tensors(), strict=True)}

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], penalty: Penalty) -> Detectors:
        """What :meth:`state_dict` was taken of.

        Raises:
            ValueError: saved with another ``warm_rounds``.
        """
        replicas, layers, window = state["recent"].shape
        if window != penalty.warm_rounds:
            raise ValueError(
                f"warm_rounds={penalty.warm_rounds} does not fit saved detectors, whose window is {window}; resume "
                f"with warm_rounds={window}"
            )
        made = cls(replicas, layers, penalty)
        made._mean, made._variance = state["mean"].clone(), state["variance"].clone()
        made._count, made._recent = state["count"].clone(), state["recent"].clone()
        return made

    def _tensors(self) -> tuple[Tensor, ...]:
        return self._mean, self._variance, self._count, self._recent


def _z(norms: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Standard scores; 0 while there is no spread to measure by."""
    return ((norms - mean) / variance.sqrt()).where(variance > 0, 0.0)


def _spread(recent: Tensor) -> Tensor:
    """Standard deviation over the last dimension, NaN being no entry."""
    seen = ~recent.isnan()
    count = seen.sum(-1).clamp(min=1)
    mean = recent.where(seen, 0.0).sum(-1) / count
    squares = (recent - mean[..., None]).where(seen, 0.0).square()
    return (squares.sum(-1) / count).sqrt()

"""What dynamic backup workers know: how long k gradients take, and how far they get.

Equations (10.1) to (10.5) as the docstrings give them; idea: Xu, Neglia and Sebastianelli 2020.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .isotonic import monotone_table

Array = npt.NDArray[np.float64]
# Beyond L eta = 2 descent diverges and every gain is negative, whatever k is.
_LARGEST_STEP = 1.98
_STANDARD_ERRORS = 2.0
_LANDSCAPE = 20  # windows in which the smoothness hardly changes


class TimeTable:
    """T(h, k): expected seconds from sending the weights to the k-th gradient, when h were awaited in the
    step before, whose stragglers may still be busy with it.

    Means of what was observed, made monotone: T(h, k) <= T(h, k+1) and T(h+1, k) <= T(h, k).

    Args:
        num_workers: n.
    """

    def __init__(self, num_workers: int) -> None:
        self._sums = np.zeros((num_workers, num_workers))
        self._counts = np.zeros((num_workers, num_workers))

    @property
    def num_workers(self) -> int:
        return len(self._sums)

    def add(self, h: int, place: int, seconds: float) -> None:
        """The ``place``-th gradient (from 1) came after ``seconds``, with ``h`` awaited before."""
        self._sums[h - 1, place - 1] += seconds
        self._counts[h - 1, place - 1] += 1

    @property
    def observed(self) -> int:
        """The largest place that any gradient was seen to come in; 0 before the first."""
        return int(np.flatnonzero(self._counts.any(axis=0))[-1]) + 1 if self._counts.any() else 0

    def estimate(self, h: int) -> Array:
        """``(n,)``: element k-1 is T(h, k).

        What was never observed is the bound that monotony gives: the upper one, from steps before which fewer were
        awaited; else the lower one, so that what may be fast is tried; else 0.
        """
        seen = np.flatnonzero(self._counts.any(axis=1))
        table = np.full_like(self._sums, np.nan)
        if len(seen):
            counts = self._counts[seen]
            means = self._sums[seen] / np.maximum(counts, 1)
            table[seen] = monotone_table(means, counts)
        lower = np.maximum.accumulate(np.nan_to_num(table[h - 1 :], nan=0.0).max(axis=0))
        upper = np.nan_to_num(table[:h], nan=np.inf).min(axis=0)
        upper = np.minimum.accumulate(upper[::-1])[::-1]
        known = np.isfinite(table[h - 1])
        times = np.where(known, table[h - 1], np.where(np.isfinite(upper), upper, lower))
        return np.maximum.accumulate(times)

    def resize(self, num_workers: int) -> None:
        """Go on with so many workers: what was learned of ranks that are gone is dropped."""
        keep = min(num_workers, self.num_workers)
        for name in ("_sums", "_counts"):
            new = np.zeros((num_workers, num_workers))
            new[:keep, :keep] = getattr(self, name)[:keep, :keep]
            setattr(self, name, new)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"sums": torch.tensor(self._sums), "counts": torch.tensor(self._counts)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """
        Raises:
            ValueError: of another number of workers.
        """
        n = self.num_workers
        if tuple(state["sums"].shape) != (n, n):
            raise ValueError(
                f"the state is of {len(state['sums'])} workers, but there are {n}; start the estimates anew"
            )
        self._sums, self._counts = state["sums"].numpy().copy(), state["counts"].numpy().copy()


def variance_of(norms_squared: Sequence[float], mean_norm_squared: float) -> float | None:
    """``V = (1/(k-1)) sum_j |g_j - m|^2``, the trace of one gradient's covariance, unbiased (10.3): of k
    gradients with mean m. Only norms are needed, as ``sum |g_j - m|^2 = sum |g_j|^2 - k |m|^2``. None if k < 2.
    """
    k = len(norms_squared)
    return None if k < 2 else max(sum(norms_squared) - k * mean_norm_squared, 0.0) / (k - 1)


def expected_gain(
    k: Array, lr: float, smoothness: float, gradient: float, variance: float
) -> Array:
    """``G(k) = eta (1 - L eta / 2) |grad F|^2 - (L eta^2 / 2) V / k``: by how much a step with the mean of k
    gradients lowers the loss at least in expectation (10.1).

    Args:
        k: any shape.
        lr: eta.
        smoothness: L.
        gradient: ``|grad F|^2``.
        variance: V.
    """
    signal = lr * (1 - smoothness * lr / 2) * gradient
    return signal - (smoothness * lr**2 / 2) * variance / k


def noise_scale_gain(k: Array, gradient: float, variance: float) -> Array:
    """``|grad F|^2 / (|grad F|^2 + V / k)``: what a step is worth, relative to one without noise, if its length
    suits the noise (McCandlish et al. 2018). It knows neither learning rate nor smoothness, so it suits
    adaptive optimizers."""
    return np.divide(gradient, gradient + variance / k, out=np.zeros_like(k), where=gradient > 0)


@dataclass(frozen=True)
class _Observed:
    """One step's raw estimates."""

    variance: float
    gradient: float  # |m|^2 - V/k; may be negative
    mean_norm_squared: float
    loss: float
    loss_variance: float  # of that mean over the workers' batches
    lr: float


class GainEstimates:
    """|grad F|^2, V and L, smoothed over the last steps.

    The mean of ``|m|^2 - V/k`` (10.4) is taken first and clamped at 0 after, which biases it less. L comes from
    the realised decreases (10.5), ``2 sum(eta |grad F|^2 - dF) / sum(eta^2 |m|^2)``: the mean of
    the steps' estimates, those with longer steps counting more. A realised decrease is a small difference of noisy
    losses, and over one window its noise is larger than L; so L, which changes slowly, looks back over 20 windows.

    Args:
        window: steps to look back.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._steps: deque[_Observed] = deque(maxlen=_LANDSCAPE * window + 1)

    @property
    def num_steps(self) -> int:
        """How many are looked back on, at most the window."""
        return min(len(self._steps), self.window)

    def add(
        self,
        norms_squared: Sequence[float],
        mean_norm_squared: float,
        losses: Sequence[float],
        lr: float,
    ) -> None:
        """One step's gradients; ``losses`` are those at its weights."""
        variance = variance_of(norms_squared, mean_norm_squared)
        if variance is None:  # one gradient says nothing of their spread
            variance = self._steps[-1].variance if self._steps else 0.0
        gradient = mean_norm_squared - variance / len(norms_squared)
        loss = float(np.mean(losses))
        if len(losses) < 2:
            loss_variance = self._steps[-1].loss_variance if self._steps else 0.0
        else:
            loss_variance = float(np.var(losses, ddof=1)) / len(losses)
        self._steps.append(
            _Observed(variance, gradient, mean_norm_squared, loss, loss_variance, lr)
        )

    @property
    def _recent(self) -> list[_Observed]:
        return list(self._steps)[-self.window :]

    @property
    def lr(self) -> float:
        """eta of the last step."""
        return self._steps[-1].lr

    @property
    def gradient(self) -> float:
        """|grad F|^2."""
        return max(float(np.mean([s.gradient for s in self._recent])), 0.0)

    @property
    def variance(self) -> float:
        return float(np.mean([s.variance for s in self._recent]))

    @property
    def smoothness(self) -> float:
        """L, within [0, 1.98 / eta]; 0 as long as no decrease was seen."""
        steps = list(self._steps)
        gained = energy = 0.0
        for step, after in itertools.pairwise(steps):
            gained += step.lr * step.gradient - (step.loss - after.loss)
            energy += step.lr**2 * step.mean_norm_squared
        if energy <= 0:
            return 0.0
        return min(max(2 * gained / energy, 0.0), _LARGEST_STEP / steps[-1].lr)

    @property
    def loss_growth(self) -> float:
        """By what share of itself the loss rose over the window, each half of it averaged, beyond what the noise of
        the workers' batches explains (two standard errors)."""
        steps = self._recent
        half = len(steps) // 2
        if not half:
            return 0.0
        early, late = steps[:half], steps[-half:]
        before, after = (float(np.mean([s.loss for s in part])) for part in (early, late))
        noise = math.sqrt(sum(s.loss_variance for s in (*early, *late))) / half
        rise = after - before - _STANDARD_ERRORS * noise
        return rise / max(abs(before), np.finfo(np.float64).tiny)

    def state_dict(self) -> dict[str, Any]:
        fields = [dataclasses.astuple(s) for s in self._steps]
        width = len(dataclasses.fields(_Observed))
        return {"steps": torch.tensor(fields, dtype=torch.float64).reshape(-1, width)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps.clear()
        self._steps.extend(_Observed(*row) for row in state["steps"].tolist())

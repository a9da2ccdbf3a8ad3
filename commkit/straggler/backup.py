"""Backup workers: take the first k of n gradients, drop the rest. Who chooses k.

The gradient is the mean of those that arrived: cheap and never exact, where codes are exact and never cheap.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from .estimates import GainEstimates, TimeTable, expected_gain, noise_scale_gain

Array = npt.NDArray[np.float64]
# Steps before shares are judged.
_PATIENCE = 100
_REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step as whoever collected its gradients saw it.

    Args:
        step: its number; each has a higher one than the last.
        awaited: k, as chosen.
        workers: whose gradients are in the mean, in order of arrival; more than k after a grace time.
        seconds: when they arrived, since the weights were sent, ascending.
        norms_squared: ``|g_j|^2`` of each, over the whole model.
        mean_norm_squared: ``|m|^2`` of their mean.
        losses: of each worker's mini-batch, at the weights that were sent.
        lr: eta with which the mean is applied.

    Raises:
        ValueError: lengths differ, or nothing arrived.
    """

    step: int
    awaited: int
    workers: tuple[int, ...]
    seconds: tuple[float, ...]
    norms_squared: tuple[float, ...]
    mean_norm_squared: float
    losses: tuple[float, ...]
    lr: float

    def __post_init__(self) -> None:
        sizes = {len(self.workers), len(self.seconds), len(self.norms_squared), len(self.losses)}
        if len(sizes) != 1 or not self.workers:
            raise ValueError(
                f"workers, seconds, norms_squared and losses must be equally many and at least one, got "
                f"{len(self.workers)}, {len(self.seconds)}, {len(self.norms_squared)} and {len(self.losses)}"
            )


class StarvedWorkerError(RuntimeError):
    """A worker's gradients are hardly ever used."""


class BackupPolicy(ABC):
    """Chooses how many gradients to wait for, step by step.

    Args:
        num_workers: n.
        min_share: raise once a worker has contributed to less than this share of what would be its fair part,
            k/n of the steps, in 100 steps or more. 0.5 where a worker has data of its own, which a slow one would
            keep out of training; 0 where all draw from the same data.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, num_workers: int, min_share: float) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers={num_workers} must be >= 1")
        if not 0 <= min_share <= 1:
            raise ValueError(f"min_share={min_share} must be in 0..1; 0 never raises, 0.5 is usual")
        self.num_workers, self.min_share = num_workers, min_share
        self._contributed = np.zeros(num_workers)
        self._fair = 0.0
        self._steps = 0

    @abstractmethod
    def choose(self) -> int:
        """k for the next step, in 1..n. The same until a step is observed."""

    def observe(self, result: StepResult) -> None:
        """A step was closed.

        Raises:
            StarvedWorkerError: see ``min_share``.
        """
        self._contributed[list(result.workers)] += 1
        self._fair += len(result.workers) / self.num_workers
        self._steps += 1
        if self._steps >= _PATIENCE and self.min_share:
            self._check_shares()

    def observe_late(self, step: int, seconds: float) -> None:  # noqa: B027  (a policy may not care)
        """A gradient of ``step`` came after it was closed, ``seconds`` after its weights were sent."""

    def resize(self, num_workers: int) -> None:
        """Go on with so many workers; what was counted of them starts anew."""
        if num_workers < 1:
            raise ValueError(f"num_workers={num_workers} must be >= 1")
        self.num_workers = num_workers
        self._contributed, self._fair, self._steps = np.zeros(num_workers), 0.0, 0

    @property
    def drop_rates(self) -> Array:
        """``(n,)``: the share of steps that went without each worker."""
        return 1 - self._contributed / max(self._steps, 1)

    def _check_shares(self) -> None:
        worker = int(self._contributed.argmin())
        if self._contributed[worker] < self.min_share * self._fair:
            raise StarvedWorkerError(
                f"worker {worker} contributed to {self._contributed[worker]:.0f} of {self._steps} steps, less "
                f"than min_share={self.min_share:g} of its fair part ({self._fair:.0f}): its data is kept out "
                "of training; deal the data anew between workers, wait for more of them, or set min_share=0 "
                "if all draw from the same data"
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "contributed": torch.tensor(self._contributed),
            "fair": self._fair,
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: of another number of workers.
        """
        if len(state["contributed"]) != self.num_workers:
            raise ValueError(
                f"the state is of {len(state['contributed'])} workers, but there are {self.num_workers}; start "
                "the policy anew"
            )
        self._contributed = state["contributed"].numpy().copy()
        self._fair, self._steps = float(state["fair"]), int(state["steps"])


class StaticBackup(BackupPolicy):
    """Always the same k: n - k backup workers (Chen et al. 2016).

    Args:
        num_workers: n.
        k: how many to wait for, 1..n. n is plain synchronous training; 4 to 8 % fewer is usual.
        min_share: see :class:`BackupPolicy`.

    Raises:
        ValueError: k is out of range.
    """

    def __init__(self, num_workers: int, k: int, min_share: float = 0.5) -> None:
        super().__init__(num_workers, min_share)
        self.k = k
        self._check_k()

    def choose(self) -> int:
        return self.k

    def resize(self, num_workers: int) -> None:
        """As above.

        Raises:
            ValueError: k is more than that.
        """
        super().resize(num_workers)
        self._check_k()

    def _check_k(self) -> None:
        if not 1 <= self.k <= self.num_workers:
            raise ValueError(
                f"k={self.k} must be in 1..{self.num_workers}, the number of workers; use "
                f"{min(max(self.k, 1), self.num_workers)}"
            )


class DBW(BackupPolicy):
    """Dynamic backup workers: the k with the largest expected decrease of the loss per second (Xu, Neglia and
    Sebastianelli 2020).

    ``k = argmax G(k) / T(h, k)`` (10.2), both estimated from the gradients that arrive: few where the gradient
    is large against its noise, as early in training, and all where noise dominates.

    Until the windows are full it awaits half of the workers. (The paper awaits all; but how long the others take is
    learnt of their late gradients too, and awaiting the slowest costs most of what a short training could gain.)

    Safeguards: one more than before, up to n, while no k promises a decrease (over a short window noise alone can
    hide the gradient for a step or two) or the loss rises; never a jump of more than ``max_change``, and never more than
    half of that beyond the slowest gradient that was ever timed: an interrupted worker's time is not known, and may be long.

    Args:
        num_workers: n.
        gain: "smoothness", of (10.1), with L from realised decreases of the loss: for SGD without momentum.
            "noise_scale": for momentum, Adam and the like, where no eta tells the step; of losses it only asks
            whether they fall.
        window: steps over which estimates are averaged. 20 where mini-batch losses are noisy.
        loss_tolerance: share by which the loss may rise over the window, beyond the noise of its mini-batches.
        max_change: largest change of k from one step to the next; n/8 with hundreds of workers.
        min_share: see :class:`BackupPolicy`.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        num_workers: int,
        gain: Literal["smoothness", "noise_scale"] = "smoothness",
        window: int = 5,
        loss_tolerance: float = 0.01,
        max_change: int = 2,
        min_share: float = 0.0,
    ) -> None:
        super().__init__(num_workers, min_share)
        if gain not in ("smoothness", "noise_scale"):
            raise ValueError(f"gain={gain!r} must be 'smoothness' (SGD) or 'noise_scale' (Adam)")
        for name, value in (("window", window), ("max_change", max_change)):
            if value < 1:
                raise ValueError(f"{name}={value} must be >= 1")
        if not loss_tolerance >= 0:
            raise ValueError(f"loss_tolerance={loss_tolerance} must be >= 0; 0.01 is usual")
        self.gain, self.loss_tolerance, self.max_change = gain, loss_tolerance, max_change
        self.times = TimeTable(num_workers)
        self.gains = GainEstimates(window)
        self._k = self._first_k()  # of the last step
        # step -> (awaited in the step before it, gradients so far), for gradients that are still to come.
        self._recent: dict[int, tuple[int, int]] = {}

    def choose(self) -> int:
        if self.gains.num_steps < self.gains.window:
            return self._first_k()
        gains = self.expected_gains()
        promised = gains.max() > 0
        k = best_k(gains, self.times.estimate(self._k)) if promised else self._k + 1
        k = min(k, self.times.observed + max(self.max_change // 2, 1))
        if self.gains.loss_growth > self.loss_tolerance:
            k = max(k, self._k + 1)
        k = min(max(k, self._k - self.max_change), self._k + self.max_change)
        return min(max(k, 1), self.num_workers)

    def _first_k(self) -> int:
        return (self.num_workers + 1) // 2

    def expected_gains(self) -> Array:
        """``(n,)``: element k-1 is G(k), in units of the loss, or relative ones with "noise_scale"."""
        k = np.arange(1.0, self.num_workers + 1)
        gradient, variance = self.gains.gradient, self.gains.variance
        if self.gain == "noise_scale":
            return noise_scale_gain(k, gradient, variance)
        return expected_gain(k, self.gains.lr, self.gains.smoothness, gradient, variance)

    def observe(self, result: StepResult) -> None:
        h, self._k = self._k, result.awaited
        for place, seconds in enumerate(result.seconds, start=1):
            self.times.add(h, place, seconds)
        self._recent[result.step] = (h, len(result.seconds))
        while len(self._recent) > _REMEMBERED:
            del self._recent[min(self._recent)]
        self.gains.add(result.norms_squared, result.mean_norm_squared, result.losses, result.lr)
        super().observe(result)

    def observe_late(self, step: int, seconds: float) -> None:
        h, arrived = self._recent.get(step, (0, self.num_workers))
        if arrived < self.num_workers:
            self.times.add(h, arrived + 1, seconds)
            self._recent[step] = (h, arrived + 1)

    def resize(self, num_workers: int) -> None:
        super().resize(num_workers)
        self.times.resize(num_workers)
        self._k = min(self._k, num_workers)
        self._recent.clear()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "k": self._k,
            "times": self.times.state_dict(),
            "gains": self.gains.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.times.load_state_dict(state["times"])
        self.gains.load_state_dict(state["gains"])
        self._k = int(state["k"])
        self._recent.clear()


def best_k(gains: Array, times: Array) -> int:
    """The k with the largest gain per second (10.2); the smaller one of equals.

    Args:
        gains: ``(n,)``, element k-1 of k.
        times: ``(n,)``, seconds.
    """
    floor = max(float(times.max(initial=0.0)) * 1e-9, np.finfo(np.float64).tiny)
    return int(np.argmax(gains / np.maximum(times, floor))) + 1

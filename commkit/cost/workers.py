"""Times of simulated workers: how long they compute, and how long the slowest of many messages takes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ..sim import Bursts
from .scenario import Scenario

Array = npt.NDArray[np.float64]
_POOL = 4096  # draws that a sum of more messages is approximated from, by its mean and deviation


class Workers:
    """Draws for one scenario; equal seeds give equal times, whatever the method.

    Args:
        scenario: whose they are.
        num: workers.
        compute_s: of a step on a middling one.

    Attributes:
        speeds: ``(num,)``, how many times as long as a middling one each takes.
    """

    def __init__(self, scenario: Scenario, num: int, compute_s: float) -> None:
        self._scenario, self.num, self._compute_s = scenario, num, compute_s
        self._state = np.random.RandomState(scenario.seed % 2**32)
        spread = scenario.compute.spread
        self.speeds: Array = np.exp(spread * self._state.standard_normal(num))
        self._latency_state = np.random.RandomState((scenario.seed + 1) % 2**32)

    def rounds(self, num_rounds: int, steps: int) -> Array:
        """``(rounds, workers)`` seconds to compute so many steps."""
        compute = self._scenario.compute
        shape = (num_rounds, self.num)
        # The sum of many log-normal steps is as good as normal; of one it is itself.
        sigma = compute.jitter / steps**0.5
        times: Array = self._compute_s * steps * np.exp(sigma * self._state.standard_normal(shape))
        if compute.stragglers is not None:
            slow = compute.stragglers
            bursts = Bursts(1.0, slow.enter, slow.leave, slow.slowdown, jitter=0.0)
            times = times * bursts.draw(self._state, num_rounds, self.num)
        return times * self.speeds

    def slowest_messages(self, num_rounds: int, messages: float, median_s: float) -> Array:
        """``(rounds,)`` seconds of ``messages`` one after another, each as slow as the slowest of all workers' at once."""
        sigma = self._scenario.link.latency_sigma
        if not sigma or messages < 1:
            return np.full(num_rounds, messages * median_s)
        pool = median_s * np.exp(sigma * self._largest_normals(_POOL))
        if messages > 64:
            spread = self._latency_state.standard_normal(num_rounds) * pool.std() * messages**0.5
            total: Array = np.maximum(messages * pool.mean() + spread, 0.0)
            return total
        drawn: Array = self._latency_state.choice(pool, (num_rounds, round(messages))).sum(axis=1)
        return drawn

    def message(self, num_rounds: int, num: int, median_s: float) -> Array:
        """``(rounds, num)`` seconds of single messages."""
        sigma = self._scenario.link.latency_sigma
        drawn: Array = np.exp(sigma * self._latency_state.standard_normal((num_rounds, num)))
        drawn *= median_s
        return drawn

    def _largest_normals(self, size: int) -> Array:
        """The largest of ``num`` standard normals each, by its inverse distribution."""
        u = torch.from_numpy(self._latency_state.uniform(size=size) ** (1 / self.num))
        largest: Array = torch.special.ndtri(u.clamp(1e-300, 1 - 1e-16)).numpy()
        return largest

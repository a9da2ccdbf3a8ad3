"""DADAO: decentralised optimisation of smooth, strongly convex sums, with momentum in continuous time.

A solver and an oracle for tests, not a way to train networks: it needs to know how smooth and how convex
the problem is (Nabli and Oyallon 2023). Ranks are simulated: each takes gradients and meets others at
random times, and moves along a linear differential equation in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from .permutation import uniform
from .topologies.base import Matrix
from .topologies.rates import gossip_constants

Vector: TypeAlias = npt.NDArray[np.float64]

X, X_, Y, Y_, Z, Z_ = range(6)
"""Places of a rank's six vectors: parameters, dual and consensus variables, each with its momentum."""


@dataclass(frozen=True, slots=True)
class DadaoConstants:
    """The method's constants, all of them functions of the problem and the graph.

    Args:
        smoothness: L, the largest curvature of any rank's function.
        convexity: mu > 0, the smallest.
        chi1: of the graph, see :class:`~commkit.outer.topologies.rates.GossipConstants`.

    Raises:
        ValueError: not 0 < mu <= L.
    """

    smoothness: float
    convexity: float
    chi1: float

    def __post_init__(self) -> None:
        if not 0 < self.convexity <= self.smoothness < math.inf:
            raise ValueError(
                f"convexity={self.convexity} must be above 0 and at most smoothness={self.smoothness}; add a "
                "regulariser to a function that is not strongly convex"
            )

    @property
    def nu(self) -> float:
        return self.convexity / 2

    @property
    def root(self) -> float:
        """sqrt(nu / L)."""
        return math.sqrt(self.nu / self.smoothness)

    def drift(self) -> Matrix:
        """(6, 6): the linear equation between events."""
        slow, fast, theta = self.root / 8, self.root / 4, 1 / (2 * self.root)
        matrix = np.zeros((6, 6))
        matrix[X, [X, X_]] = -slow, slow
        matrix[X_, [X, X_]] = slow, -slow
        matrix[Y, [Y, Y_]] = -fast, fast
        matrix[Y_, [Y, Z, X_]] = -theta, -theta, -theta * self.nu
        matrix[Z, [Z, Z_]] = -fast, fast
        matrix[Z_, [Z, Z_]] = slow, -slow
        return matrix

    def gradient_steps(self) -> Vector:
        """(6,): what a gradient event adds of its direction to each vector."""
        steps = np.zeros(6)
        steps[X] = -1 / (4 * self.smoothness)
        steps[X_] = -1 / (4 * math.sqrt(self.smoothness * self.nu))
        steps[Y_] = self.root / 4 + 1
        return steps

    def meeting_steps(self) -> Vector:
        """(6,): what a meeting takes of the difference from each vector of the first rank."""
        steps = np.zeros(6)
        steps[Z] = 1 / 2
        steps[Z_] = 2 * self.chi1 / self.root
        return steps


class Dadao:
    """Minimises the sum of all ranks' functions, each rank knowing its own alone.

    Every rank takes gradients at rate 1, and pairs meet at ``rates``, both at random times. A rank's vectors
    are brought up to date when something happens to it.

    Args:
        gradients: one function (p,) -> (p,) per rank, all between ``convexity`` and ``smoothness``.
        start: (p,), where all ranks start.
        smoothness: L.
        convexity: mu.
        rates: (n, n) meetings of each pair per gradient; see
            :func:`~commkit.outer.topologies.rates.pair_rates` and :func:`sufficient_rate`.
        seed: of the random times.

    Attributes:
        state: (n, 6, p) float64, each rank's at the time of its last event.
        time: of the last event.
        gradients_taken, meetings: counts.

    Raises:
        ValueError: constants out of range, a number of functions that is not that of the rates, ranks that
            cannot reach each other, or meet too rarely.
    """

    def __init__(
        self,
        gradients: Sequence[Callable[[Vector], Vector]],
        start: Vector,
        smoothness: float,
        convexity: float,
        rates: Matrix,
        seed: int = 0,
    ) -> None:
        n = len(gradients)
        if np.shape(rates) != (n, n):
            raise ValueError(
                f"rates are {np.shape(rates)} but there are {n} functions; give ({n}, {n})"
            )
        needed = sufficient_rate(rates)
        if needed > 1 + 1e-9:
            raise ValueError(
                f"pairs meet too rarely for the graph: chi1 chi2 must be at most 1/2; use rates {needed:.3g} "
                "times as high"
            )
        self.constants = DadaoConstants(smoothness, convexity, gossip_constants(rates).chi1)
        self.state = np.zeros((n, 6, len(start)))
        self.state[:, X] = self.state[:, X_] = start
        self.time, self.gradients_taken, self.meetings = 0.0, 0, 0
        self._clocks = np.zeros(n)
        self._gradients = list(gradients)
        self._pairs = np.argwhere(np.triu(rates) > 0)
        self._cumulated = np.cumsum([1.0] * n + [rates[i, j] for i, j in self._pairs])
        self._drift = torch.from_numpy(self.constants.drift())
        self._seed, self._events = seed, 0

    def run(self, duration: float) -> Vector:
        """Let ``duration`` pass, in which each rank takes about as many gradients. The parameters of all
        ranks, (n, p), at its end."""
        end = self.time + duration
        while True:
            wait, which = (uniform(self._seed, self._events, k) for k in (0, 1))
            self._events += 1
            # Time of a Poisson process has no memory: the wait beyond the end is drawn anew.
            self.time += -math.log1p(-wait) / self._cumulated[-1]
            if self.time > end:
                break
            self._event(int(np.searchsorted(self._cumulated, which * self._cumulated[-1], "right")))
        self.time = end
        for i in range(len(self.state)):
            self._advance(i)
        return self.state[:, X].copy()

    def _event(self, number: int) -> None:
        n = len(self.state)
        if number < n:
            self._advance(number)
            own, nu = self.state[number], self.constants.nu
            direction = self._gradients[number](own[X].copy()) - nu * own[X] - own[Y_]
            own += np.outer(self.constants.gradient_steps(), direction)
            self.gradients_taken += 1
            return
        i, j = self._pairs[number - n]
        self._advance(i)
        self._advance(j)
        a, b = self.state[i], self.state[j]
        change = np.outer(self.constants.meeting_steps(), (a[Y] + a[Z]) - (b[Y] + b[Z]))
        a -= change
        b += change
        self.meetings += 1

    def _advance(self, i: int) -> None:
        elapsed = self.time - self._clocks[i]
        self.state[i] = torch.linalg.matrix_exp(self._drift * elapsed).numpy() @ self.state[i]
        self._clocks[i] = self.time


def sufficient_rate(rates: Matrix) -> float:
    """By what factor meetings must be more frequent for the method's guarantee, ``chi1 chi2 <= 1/2``; 1 or
    less says that they are frequent enough.

    Raises:
        ValueError: see :func:`~commkit.outer.topologies.rates.gossip_constants`.
    """
    constants = gossip_constants(rates)
    return math.sqrt(2 * constants.chi1 * constants.chi2)

"""Topologies that change with the round: one message per rank and round."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...registry import register
from .. import pairing
from .base import Matrix, Topology
from .static import exponents


@register("topology", "one_peer_exponential")
@dataclass(frozen=True)
class OnePeerExponential(Topology):
    """In round k half of oneself and half of the rank 2^(k mod L) before, L = ceil(log2 n) (Assran et al.
    2019). Exact after L rounds if n is a power of two; otherwise what is left after L rounds is small (8 % at
    n = 6) and the mean is conserved all the same. Directed: the default of push-sum."""

    def period(self, n: int) -> int | None:
        return max(1, exponents(n))

    def matrix(self, n: int, round: int) -> Matrix:
        if n == 1:
            return np.ones((1, 1))
        half, rows = np.eye(n) / 2, np.arange(n)
        half[rows, (rows - 2 ** (round % exponents(n))) % n] += 0.5
        return half


class _Pairs(Topology):
    """Pairs that take the mean of both; who has no partner keeps its own."""

    @abstractmethod
    def partners(self, n: int, round: int) -> Sequence[int]:
        """Whom each rank meets in a round, see :mod:`commkit.outer.pairing`."""

    def matrix(self, n: int, round: int) -> Matrix:
        half, rows = np.eye(n) / 2, np.arange(n)
        half[rows, self.partners(n, round)] += 0.5
        return half


@register("topology", "hypercube")
@dataclass(frozen=True)
class Hypercube(_Pairs):
    """In round k the pairs whose numbers differ in bit k mod log2 n: exact after log2 n rounds, and symmetric.

    Raises:
        ValueError: n is not a power of two.
    """

    links_are_fixed: ClassVar[bool] = True

    def period(self, n: int) -> int | None:
        return max(1, exponents(n))

    def partners(self, n: int, round: int) -> Sequence[int]:
        return pairing.hypercube(n, round)


@register("topology", "round_robin")
@dataclass(frozen=True)
class RoundRobin(_Pairs):
    """A tournament: everybody meets everybody once in n - 1 rounds (n if n is odd, where one rank sits out
    each time)."""

    def period(self, n: int) -> int | None:
        return max(1, n - 1 + n % 2)

    def partners(self, n: int, round: int) -> Sequence[int]:
        return pairing.round_robin(n, round)


@register("topology", "random_pairs")
@dataclass(frozen=True)
class RandomPairs(_Pairs):
    """New random pairs every round; an odd rank sits out. Expected squared distance from the mean shrinks by
    (n - 2) / (2 (n - 1)) per round: a rate that does not fall with n.

    Args:
        seed: of the draws; equal on every rank.
    """

    seed: int = 0

    def period(self, n: int) -> int | None:
        return None

    def partners(self, n: int, round: int) -> Sequence[int]:
        return pairing.random_pairs(n, self.seed, round)

    def mean_matrix(self, n: int) -> Matrix:
        if n == 1:
            return np.ones((1, 1))
        paired = 1 - n % 2 / n  # the chance not to sit out
        mean = np.full((n, n), paired / (2 * (n - 1)))
        np.fill_diagonal(mean, 1 - paired / 2)
        return mean

    def mean_square_rate(self, n: int) -> float:
        """A round's matrix M is a projection, so E[M'M] = E[M], whose eigenvalue off the mean this is; 1/2
        for odd n."""
        return float(1 - (1 - n % 2 / n) * n / (2 * (n - 1)))

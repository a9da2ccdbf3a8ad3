"""What a topology is: mixing matrices by the round, and what each rank sends and receives in it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from .connectivity import metropolis, require_connected

Matrix: TypeAlias = npt.NDArray[np.float64]

# Of sums of a few dozen float64 numbers of size 1.
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Neighbours:
    """One rank's part in one round.

    Args:
        sends: peer -> the share that the peer's next vector has of this rank's.
        receives: peer -> the share that this rank's next vector has of the peer's.
        self_weight: the share that it has of its own.
    """

    sends: Mapping[int, float]
    receives: Mapping[int, float]
    self_weight: float


class Topology(ABC):
    """A graph, or a schedule of graphs, for any number of ranks that it allows: a frozen dataclass that is
    its own configuration.

    ``links_are_fixed`` says what happens when ranks are lost. True: a link stands for a wire, so the
    survivors keep the links among themselves, with Metropolis weights. False: anybody can reach anybody,
    so the same topology is laid over the survivors anew.
    """

    links_are_fixed: ClassVar[bool] = False

    @abstractmethod
    def period(self, n: int) -> int | None:
        """After how many rounds the matrices repeat; None: each round draws its own."""

    @abstractmethod
    def matrix(self, n: int, round: int) -> Matrix:
        """(n, n) float64, non-negative: element (i, j) is the share that i's next vector has of j's.

        Raises:
            ValueError: the topology does not exist for ``n`` ranks.
        """

    def mean_square_rate(self, n: int) -> float:
        """How far one round contracts the expected squared distance from the mean; of random topologies
        only."""
        raise NotImplementedError(f"{type(self).__name__} is not random: its period says it")

    def mean_matrix(self, n: int) -> Matrix:
        """The matrices' mean over all rounds."""
        period = self.period(n)
        if period is None:
            raise NotImplementedError(f"{type(self).__name__} has no period: override mean_matrix")
        return np.mean([self.matrix(n, r) for r in range(period)], axis=0)  # type: ignore[no-any-return]

    def mixing(self, world_size: int) -> Mixing:
        """The topology over ranks 0 to ``world_size - 1``.

        Raises:
            ValueError: it does not exist for so many, or is not connected.
        """
        if world_size < 1:
            raise ValueError(f"world_size={world_size} must be >= 1")
        return Mixing(self, range(world_size))


class Mixing:
    """A topology over given ranks: a pure function of the round, equal on every rank that computes it.

    Args:
        topology: which one.
        ranks: who takes part, in the order of the matrices' rows.
        alive: places in ``ranks`` that are left of a topology whose links are fixed; None: all.

    Attributes:
        ranks: the ranks that are left; row i of a matrix is ``ranks[i]``'s.
        row_stochastic, column_stochastic: shares received, or given, add up to 1 on every rank. Rows are
            what keeps equal vectors equal; columns are what conserves the mean, and all that push-sum
            needs.
        doubly_stochastic: both.
        symmetric: every round's matrix is its own transpose, so an exchange goes both ways.

    Raises:
        ValueError: the ranks that are left cannot reach each other.
    """

    def __init__(
        self, topology: Topology, ranks: Sequence[int], alive: Sequence[int] | None = None
    ) -> None:
        self.topology = topology
        self._all = tuple(ranks)
        self._alive = tuple(range(len(self._all))) if alive is None else tuple(alive)
        self.ranks = tuple(self._all[i] for i in self._alive)
        self._place = {rank: i for i, rank in enumerate(self.ranks)}
        links = topology.mean_matrix(len(self._all))
        self._mean_links = links[np.ix_(self._alive, self._alive)]
        name = f"{type(topology).__name__} over {len(self._all)} ranks"
        require_connected(self._mean_links > 0, self.ranks, name)
        # Drawn rounds are of one kind, so one round stands for all of them.
        seen = [self.matrix(r) for r in range(self.period or 1)]
        self.row_stochastic = all(_close(m.sum(1), 1) for m in seen)
        self.column_stochastic = all(_close(m.sum(0), 1) for m in seen)
        self.doubly_stochastic = self.row_stochastic and self.column_stochastic
        self.symmetric = all(_close(m, m.T) for m in seen)

    @property
    def period(self) -> int | None:
        """After how many rounds the matrices repeat; None: each round draws its own."""
        return self.topology.period(len(self._all))

    def matrix(self, round: int) -> Matrix:
        """(n, n) float64 of round ``round`` for n = ``len(ranks)``; element (i, j) is the share that the next
        vector of ``ranks[i]`` has of that of ``ranks[j]``: ``x <- matrix @ x``."""
        whole = self.topology.matrix(len(self._all), round)
        if len(self._alive) == len(self._all):
            return whole
        return metropolis(whole[np.ix_(self._alive, self._alive)] > 0)

    def mean_matrix(self) -> Matrix:
        """The matrices' mean over all rounds."""
        if len(self._alive) == len(self._all):
            return self._mean_links.copy()
        return np.mean([self.matrix(r) for r in range(self.period or 1)], axis=0)  # type: ignore[no-any-return]

    def product(self, round: int, steps: int) -> Matrix:
        """What ``steps`` rounds from ``round`` on do together: ``x <- product @ x``. Multiple gossip steps of
        round r with Q of them are the rounds from ``r * Q`` on, so that schedules go on where they were."""
        product: Matrix = np.eye(len(self.ranks))
        for r in range(round, round + steps):
            product = self.matrix(r) @ product
        return product

    def neighbours(self, rank: int, round: int) -> Neighbours:
        """What ``rank`` sends and receives in round ``round``.

        A message that does not arrive: of a row-stochastic matrix, the receiver adds its share to its own
        (the mean then drifts by what was lost).

        Raises:
            ValueError: ``rank`` is not one of ``ranks``.
        """
        if rank not in self._place:
            raise ValueError(f"rank {rank} takes no part in this topology; its ranks: {self.ranks}")
        i, matrix = self._place[rank], self.matrix(round)
        return Neighbours(
            sends=self._weights(matrix[:, i], i),
            receives=self._weights(matrix[i], i),
            self_weight=float(matrix[i, i]),
        )

    def gap(self) -> float:
        """1 - the factor by which a round shrinks the distance from the mean at worst: 1 - ||M - 11'/n||_2.
        1 means that one round averages exactly. Of a schedule, the geometric mean over its period; of a
        random one, the root of the expected squared factor; of columns alone that add up to 1, 1 - the
        second eigenvalue's magnitude, which is push-sum's rate in the long run."""
        if len(self.ranks) == 1:
            return 1.0
        if self.period is None:
            return 1 - math.sqrt(self.topology.mean_square_rate(len(self.ranks)))
        if not self.row_stochastic:
            second = sorted(abs(np.linalg.eigvals(self.product(0, self.period))))[-2]
            return float(1 - second ** (1 / self.period))
        return 1 - math.pow(self._residual(self.period), 1 / self.period)

    def exact_after(self) -> int | None:
        """After how many rounds from round 0 on everybody has the exact mean; None: never."""
        if len(self.ranks) == 1:
            return 0
        for rounds in range(1, (self.period or 0) + 1):
            if self._residual(rounds) < _ROUNDING * len(self.ranks):
                return rounds
        return None

    def without(self, lost: Collection[int]) -> Mixing:
        """The topology after the loss of ranks, which keep their numbers. Every survivor must change over at
        the same round: half of an old matrix and half of a new one conserve nothing.

        Raises:
            ValueError: a rank that takes no part, nobody left, a topology that does not exist for so many,
                or survivors that cannot reach each other.
        """
        strangers = sorted(set(lost) - set(self.ranks))
        if strangers:
            raise ValueError(
                f"ranks {strangers} take no part in this topology; its ranks: {self.ranks}"
            )
        left = [i for i in self._alive if self._all[i] not in lost]
        if not left:
            raise ValueError(f"lost={sorted(lost)} are all ranks; there is nobody left to train")
        if self.topology.links_are_fixed:
            return Mixing(self.topology, self._all, left)
        return Mixing(self.topology, [self._all[i] for i in left])

    def _weights(self, shares: Matrix, own: int) -> dict[int, float]:
        return {self.ranks[j]: float(w) for j, w in enumerate(shares) if w > 0 and j != own}

    def _residual(self, rounds: int) -> float:
        """||what the first rounds do - the mean||_2; of push-sum, after its division by the mass received."""
        product = self.product(0, rounds)
        product = product / product.sum(1, keepdims=True)
        return float(np.linalg.norm(product - 1 / len(self.ranks), 2))


def _close(a: Matrix, b: Matrix | float) -> bool:
    return bool(np.abs(a - b).max(initial=0.0) < _ROUNDING)

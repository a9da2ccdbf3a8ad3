"""Gradient codes: redundant work, so that the exact sum of gradients does not need every worker.

One step's data is cut into ``num_partitions`` equal partitions with gradient sums ``g_j``. Worker i computes
those of its row's support and sends ``f_i = sum_j B_ij g_j``. From the workers S that arrived, ``a`` with
``a^T B_S = 1`` gives ``sum_i a_i f_i = sum_j g_j``, exactly (Tandon et al. 2017). Pure: no communication.

What it asks of training: g_j is the same wherever it is computed, so weights, samples, augmentation and dropout
follow (step, partition), and each partition is a forward and backward pass of its own.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from .conditioning import Array, solutions, worst_amplification
from .masks import mask_of, members

# Decoding has to give the sum to this accuracy, else it is not possible.
_RESIDUAL = 1e-6
# float32 keeps 24 bits; beyond this error of a decoded sum, relative to the gradients, the code is reported.
_FLOAT32_LOSS, _TOLERATED_LOSS = 2.0**-24, 1e-4
_MAX_CACHED = 65536
_ZERO = 1e-12


class ConditioningWarning(UserWarning):
    """A code's decoded sums lose more to rounding than float32 can spare."""


class GradientCode(ABC):
    """A matrix B, who computes what by it, and how the sum is put together again.

    Args:
        num_workers: n, >= 1.
        num_stragglers: s, how many may be missing in any combination; 0 <= s < n.
        matrix: B, float64 ``(n, num_partitions)``; row i is worker i's.

    Raises:
        ValueError: s is out of range.
    """

    name: str

    def __init__(self, num_workers: int, num_stragglers: int, matrix: Array) -> None:
        self.num_workers, self.num_stragglers = num_workers, num_stragglers
        self.matrix = np.ascontiguousarray(matrix, dtype=np.float64)
        self.matrix.setflags(write=False)
        self._partitions = tuple(tuple(np.flatnonzero(row).tolist()) for row in self.matrix)
        self._cache: dict[int, Array | None] = {}
        self._amplification: float | None = None

    @property
    def num_partitions(self) -> int:
        """Into how many equal partitions a step's data is cut."""
        return int(self.matrix.shape[1])

    @property
    def replication(self) -> int:
        """On how many workers each partition is, which is by how much more is computed."""
        return int((self.matrix != 0).sum(axis=0).max())

    @property
    def load(self) -> float:
        """The largest share of a step's data that a worker computes; 1/n without a code."""
        return max(map(len, self._partitions)) / self.num_partitions

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that are equal on all ranks if they share B. Of float32 values, as the last
        bits of a float64 solution differ between machines."""
        head = f"{self.name}/{self.num_workers}/{self.num_stragglers}/".encode()
        return hashlib.sha256(head + self.matrix.astype("<f4").tobytes()).hexdigest()[:16]

    def partitions_of(self, worker: int) -> tuple[int, ...]:
        """Ascending numbers of the partitions that ``worker`` computes."""
        return self._partitions[self._worker(worker)]

    def coefficients_of(self, worker: int) -> dict[int, float]:
        """Partition -> the factor of its gradient in what ``worker`` sends."""
        row = self.matrix[self._worker(worker)]
        return {j: float(row[j]) for j in self._partitions[worker]}

    def runs_of(self, worker: int) -> tuple[tuple[int, int, float], ...]:
        """:meth:`coefficients_of` as (first partition, last + 1, coefficient). Neighbours that every worker has
        together and with equal coefficients are one run: one forward and backward pass will do."""
        runs: list[tuple[int, int, float]] = []
        for j, coefficient in self.coefficients_of(worker).items():
            joined = (
                runs and runs[-1][1] == j and (self.matrix[:, j - 1] == self.matrix[:, j]).all()
            )
            start = runs.pop()[0] if joined else j
            runs.append((start, j + 1, coefficient))
        return tuple(runs)

    def encode(self, worker: int, gradients: Mapping[int, Tensor]) -> Tensor:
        """What ``worker`` sends: ``sum_j B_ij g_j``, added up in the order of the partitions.

        Args:
            gradients: partition -> its gradient *sum*, any float dtype, equal shapes. Further partitions
                are not looked at.

        Returns:
            A fresh tensor, float64 if the gradients are, else float32: rounded to half precision a coded sum
            could not be decoded, since the gradients are of opposite signs in it.

        Raises:
            ValueError: one of the worker's partitions is missing, or shapes or dtypes differ.
        """
        total: Tensor | None = None
        for partition, coefficient in self.coefficients_of(worker).items():
            if partition not in gradients:
                raise ValueError(
                    f"gradients has no partition {partition}, but worker {worker} computes "
                    f"{self.partitions_of(worker)}; give all of them"
                )
            gradient = gradients[partition]
            if not gradient.is_floating_point():
                raise ValueError(
                    f"gradients[{partition}] has dtype {gradient.dtype}; give a float dtype"
                )
            if total is None:
                dtype = torch.promote_types(gradient.dtype, torch.float32)
                total = torch.zeros_like(gradient, dtype=dtype)
            if gradient.shape != total.shape:
                raise ValueError(
                    f"gradients[{partition}] has shape {tuple(gradient.shape)}, but the partitions "
                    f"before it {tuple(total.shape)}; all must be of one model"
                )
            total.add_(gradient.to(total.dtype), alpha=coefficient)
        assert total is not None
        return total

    def decode_weights(self, arrived: Collection[int]) -> Array | None:
        """``a`` with ``sum_i a_i f_i = sum_j g_j``, from all that arrived.

        Args:
            arrived: workers whose vectors are there, at least n - s of them; often fewer will do.

        Returns:
            float64 ``(n,)``, zero for workers that did not arrive, of the smallest norm where there is a
            choice; read-only, as it is kept for the next time. None: the sum cannot be had from these.
        """
        mask = mask_of(arrived, self.num_workers)
        if mask not in self._cache:
            if len(self._cache) >= _MAX_CACHED:
                self._cache.clear()
            weights = self._solve(members(mask))
            if weights is not None:
                weights.setflags(write=False)
            self._cache[mask] = weights
        return self._cache[mask]

    def terms(self, arrived: Collection[int]) -> list[tuple[int, float]] | None:
        """The workers that enter the sum and their weights, in the order in which to add them up: by the first partition
        that each has. So a worker's vector takes the very place of its replica's, and the sum has the same bits. None as
        in :meth:`decode_weights`."""
        weights = self.decode_weights(arrived)
        if weights is None:
            return None
        chosen = sorted(np.flatnonzero(weights).tolist(), key=lambda i: (self._partitions[i][0], i))
        return [(i, float(weights[i])) for i in chosen]

    def can_decode(self, arrived: Collection[int]) -> bool:
        """Whether :meth:`decode_weights` has an answer."""
        return self.decode_weights(arrived) is not None

    def approximate_weights(self, arrived: Collection[int]) -> tuple[Array, float]:
        """Weights that come as near to the sum as ``arrived`` allows. The gradient is biased: parts of the
        data count more than others. Nobody calls this unless asked to.

        Returns:
            float64 ``(n,)``, scaled so that the partitions' weights add up to their number, and the residual
            ``|a^T B - 1|`` before that, in units of one partition: 0 is exact.

        Raises:
            ValueError: nothing useful arrived.
        """
        rows = members(mask_of(arrived, self.num_workers))
        ones = np.ones(self.num_partitions)
        if not rows:
            raise ValueError("arrived is empty; wait for at least one worker")
        solution = np.linalg.lstsq(self.matrix[rows].T, ones, rcond=None)[0]
        weights = np.zeros(self.num_workers)
        weights[rows] = solution
        shares = weights @ self.matrix
        if shares.sum() <= 0:
            raise ValueError(
                f"arrived={sorted(rows)} says nothing about the sum; wait for more workers"
            )
        return weights * (self.num_partitions / shares.sum()), float(np.linalg.norm(shares - ones))

    @abstractmethod
    def _solve(self, rows: list[int]) -> Array | None:
        """:meth:`decode_weights` of the workers ``rows``, ascending."""

    @abstractmethod
    def amplification(self) -> float:
        """By how much rounding errors of the g_j grow in the sum: the largest ``sum_i |a_i B_ij|`` over
        partitions j and sets of s stragglers. 1 is perfect."""

    def _worker(self, worker: int) -> int:
        if not 0 <= worker < self.num_workers:
            raise ValueError(
                f"worker={worker} must be in 0..{self.num_workers - 1}, the workers of this code"
            )
        return worker


class FractionalRepetition(GradientCode):
    """Blocks of s + 1 partitions, each computed in full by s + 1 workers; the default.

    Worker i does block ``i mod n/(s+1)`` with coefficients 1, and a sum takes one worker of each block: nothing
    is amplified, the sum has the same bits whoever arrives, and many more sets than those of s stragglers
    decode. Copies of a block are n/(s+1) ranks apart, so with ranks numbered node by node they are on different
    nodes, unless a node has more workers than there are blocks.

    Args:
        num_workers: n, a multiple of s + 1.
        num_stragglers: s.

    Raises:
        ValueError: s is out of range, or n is not divisible.
    """

    name = "fractional_repetition"

    def __init__(self, num_workers: int, num_stragglers: int) -> None:
        check_stragglers(num_workers, num_stragglers)
        size = num_stragglers + 1
        if num_workers % size:
            raise ValueError(
                f"num_workers={num_workers} must be divisible by num_stragglers + 1 = {size} for "
                "fractional_repetition; use code 'cyclic_mds' or 'cyclic_random', or 'auto', which finds "
                "one"
            )
        self.num_blocks = num_workers // size
        matrix = np.zeros((num_workers, num_workers))
        for worker in range(num_workers):
            block = worker % self.num_blocks
            matrix[worker, block * size : (block + 1) * size] = 1
        super().__init__(num_workers, num_stragglers, matrix)

    def amplification(self) -> float:
        return 1.0

    def _solve(self, rows: list[int]) -> Array | None:
        first: dict[int, int] = {}
        for row in rows:
            first.setdefault(row % self.num_blocks, row)
        if len(first) < self.num_blocks:
            return None
        weights = np.zeros(self.num_workers)
        weights[list(first.values())] = 1
        return weights


class CyclicCode(GradientCode):
    """Codes whose worker i computes partitions i to i + s (modulo n), with real coefficients.

    Every solution of ``a^T B = 1`` is ``a0 + N c``: a0 the one of smallest norm, N an orthonormal basis of what
    B's rows cancel to. Decoding is the smallest c that makes a vanish where workers are missing: a small, well
    scaled system, whatever n is.
    """

    def __init__(self, num_workers: int, num_stragglers: int, matrix: Array) -> None:
        super().__init__(num_workers, num_stragglers, matrix)
        self._base, self._null = solutions(self.matrix, num_stragglers)
        loss = self.amplification() * _FLOAT32_LOSS
        if loss >= 1:
            raise ValueError(
                f"the {self.name} code for num_workers={num_workers}, num_stragglers={num_stragglers} "
                f"amplifies rounding errors by up to {self.amplification():.3g}, which leaves nothing of "
                "float32 gradients; choose num_stragglers so that num_stragglers + 1 divides num_workers, "
                "or a smaller one"
            )
        if loss > _TOLERATED_LOSS:
            warnings.warn(
                f"the {self.name} code for num_workers={num_workers}, num_stragglers={num_stragglers} "
                f"amplifies rounding errors by up to {self.amplification():.3g}, which costs float32 "
                f"gradients {loss:.1g} of their size; choose num_stragglers so that num_stragglers + 1 "
                "divides num_workers",
                ConditioningWarning,
                stacklevel=3,
            )

    def amplification(self) -> float:
        """As above; over a fixed choice of straggler sets where there are more than 20,000."""
        if self._amplification is None:
            self._amplification = worst_amplification(self.matrix, self.num_stragglers)
        return self._amplification

    def _solve(self, rows: list[int]) -> Array | None:
        here = set(rows)
        missing = [i for i in range(self.num_workers) if i not in here]
        weights = self._base.copy()
        if missing:
            weights += self._null @ self._correction(missing)
            weights[missing] = 0
        weights[np.abs(weights) < _ZERO * np.abs(weights).max()] = 0  # spares somebody's message
        residual = np.abs(weights @ self.matrix - 1).max()
        return weights if residual < _RESIDUAL else None

    def _correction(self, missing: list[int]) -> Array:
        """The smallest c with ``a0 + N c = 0`` at ``missing``, or the nearest to it if there is none."""
        system, target = self._null[missing], -self._base[missing]
        if len(missing) == self.num_stragglers:
            try:
                exact: Array = np.linalg.solve(system, target).astype(np.float64)
                return exact
            except np.linalg.LinAlgError:
                pass
        nearest: Array = np.linalg.lstsq(system, target, rcond=None)[0].astype(np.float64)
        return nearest


class CyclicMDS(CyclicCode):
    """The deterministic cyclic code: coefficients of a polynomial whose roots are s consecutive n-th roots of
    unity, centred on -1 (Raviv et al. 2018). Real if n - s is odd.

    Amplification is 1 for s = 1, 11 for (8, 3), 50 for (16, 3), 366 for (16, 5).

    Args:
        num_workers: n.
        num_stragglers: s, with n - s odd (or s = 0).

    Raises:
        ValueError: s is out of range, or n - s is even.
    """

    name = "cyclic_mds"

    def __init__(self, num_workers: int, num_stragglers: int) -> None:
        check_stragglers(num_workers, num_stragglers)
        if num_stragglers and (num_workers - num_stragglers) % 2 == 0:
            raise ValueError(
                f"num_workers - num_stragglers = {num_workers - num_stragglers} must be odd for cyclic_mds "
                f"to be real; use num_stragglers={num_stragglers + 1}, or code 'cyclic_random'"
            )
        # n - s odd: the s exponents around n/2 come in conjugate pairs, with n/2 itself if n is even.
        first = (num_workers - num_stragglers + 1) // 2
        exponents = np.arange(first, first + num_stragglers)
        polynomial = np.array([1.0 + 0j])
        for root in np.exp(2j * np.pi * exponents / num_workers):
            polynomial = np.convolve(polynomial, [-root, 1])
        row = np.zeros(num_workers)
        row[: num_stragglers + 1] = polynomial.real / polynomial.real[0]
        matrix = np.stack([np.roll(row, i) for i in range(num_workers)])
        super().__init__(num_workers, num_stragglers, matrix)


class CyclicRandom(CyclicCode):
    """The random cyclic code: any s < n, but badly conditioned; the best of many draws (Tandon et al. 2017).

    Typical amplification is 5 to 90 for (4, 1) and 1e4 to 1e5 for (16, 3), of a single draw.

    Args:
        num_workers: n.
        num_stragglers: s.
        seed: of the draws; all ranks need the same.
        draws: how many to choose from. More take longer to build and are better conditioned.

    Raises:
        ValueError: s is out of range, or draws < 1.
    """

    name = "cyclic_random"

    def __init__(
        self, num_workers: int, num_stragglers: int, seed: int = 0, draws: int = 200
    ) -> None:
        check_stragglers(num_workers, num_stragglers)
        if draws < 1:
            raise ValueError(f"draws={draws} must be >= 1; 200 is a good number")
        # The legacy generator: NumPy has promised that its streams never change.
        generator = np.random.RandomState(seed % 2**32)
        best, least = np.eye(num_workers), math.inf
        for _ in range(draws if num_stragglers else 0):
            H = generator.standard_normal((num_stragglers, num_workers))
            H[:, -1] = -H[:, :-1].sum(axis=1)
            matrix = cyclic_matrix(H)
            amplification = worst_amplification(matrix, num_stragglers, max_sets=500)
            if amplification < least:
                best, least = matrix, amplification
        super().__init__(num_workers, num_stragglers, best)


def cyclic_matrix(H: Array) -> Array:
    """B with row i on i..i+s (modulo n), ``B_ii = 1`` and ``H B_i = 0`` (Tandon et al. 2017, algorithm 2).

    Args:
        H: ``(s, n)``, each row adding up to 0.
    """
    s, n = H.shape
    supports = (np.arange(n)[:, None] + np.arange(1, s + 1)) % n
    systems = H[:, supports].transpose(1, 0, 2)  # (n, s, s)
    rest = -np.linalg.solve(systems, H.T[..., None])[..., 0]
    matrix = np.eye(n)
    np.put_along_axis(matrix, supports, rest, axis=1)
    return matrix


def check_stragglers(num_workers: int, num_stragglers: int) -> None:
    """
    Raises:
        ValueError: not ``0 <= num_stragglers < num_workers``.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers={num_workers} must be >= 1")
    if not 0 <= num_stragglers < num_workers:
        raise ValueError(
            f"num_stragglers={num_stragglers} must be >= 0 and < num_workers={num_workers}, or nobody "
            f"would be left; use at most {num_workers - 1}"
        )

"""Gossip without rounds: how often each pair meets, and what that says about its graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .base import Matrix, Mixing
from .connectivity import require_connected


@dataclass(frozen=True, slots=True)
class GossipConstants:
    """How well pairs that meet at given rates keep everybody together.

    Args:
        chi1: 1 / the second eigenvalue of the rates' Laplacian: the time in which the slowest difference decays.
        chi2: the largest effective resistance of a link, halved: how much of it has no way round.
    """

    chi1: float
    chi2: float


def pair_rates(mixing: Mixing, rate: float = 1.0) -> Matrix:
    """How often each pair meets if meetings follow the mixing's shares.

    Args:
        mixing: the graph; of a schedule its mean, of a directed one both directions' mean.
        rate: meetings per rank and unit of time, on average over the ranks; the unit is commonly one gradient
            step.

    Returns:
        (n, n) float64, symmetric, zero diagonal; rows add up to ``rate`` on average.

    Raises:
        ValueError: the rate is not above 0.
    """
    if not 0 < rate < np.inf:
        raise ValueError(f"rate={rate} must be above 0 and finite; use 1 for one meeting per step")
    shares = mixing.mean_matrix()
    shares = (shares + shares.T) / 2
    np.fill_diagonal(shares, 0)
    total = shares.sum()
    return shares * (rate * len(shares) / total) if total else shares


def laplacian(rates: Matrix) -> Matrix:
    """Sum over pairs of rate (e_i - e_j)(e_i - e_j)'.

    Raises:
        ValueError: rates that are not symmetric, negative, or of a rank with itself.
    """
    rates = np.asarray(rates, dtype=np.float64)
    if (rates < 0).any() or not np.allclose(rates, rates.T) or np.diag(rates).any():
        raise ValueError("rates must be symmetric, >= 0, and 0 on the diagonal; use pair_rates")
    return np.diag(rates.sum(1)) - rates


def gossip_constants(rates: Matrix) -> GossipConstants:
    """The constants of pairs that meet at ``rates``, of at least two ranks.

    Raises:
        ValueError: one rank alone, ranks that cannot reach each other, or rates that are none.
    """
    n = len(rates)
    if n < 2:
        raise ValueError(f"rates of {n} ranks have no pairs; there is nobody to talk to")
    require_connected(np.asarray(rates) > 0, range(n), f"a graph of {n} ranks")
    matrix = laplacian(rates)
    inverse = np.linalg.pinv(matrix, hermitian=True)
    i, j = np.nonzero(np.triu(rates))
    resistances = inverse[i, i] + inverse[j, j] - 2 * inverse[i, j]
    return GossipConstants(
        chi1=float(1 / np.linalg.eigvalsh(matrix)[1]), chi2=float(resistances.max() / 2)
    )

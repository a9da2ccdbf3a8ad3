"""Which outer settings converge when replicas keep a part of their own weights: pure arithmetic."""

from __future__ import annotations

import numpy as np

_GRID = 512


def mixing_radius(kappa: float, lr: float, momentum: float, mixing: float, overlap: float) -> float:
    """How the error of one direction shrinks per round of Streaming DiLoCo in the long run.

    Without noise, and with local training that contracts a direction by ``1 - kappa`` in H steps (equally in
    each), anchor, momentum and weight at the snapshot follow a linear recursion; this is its spectral
    radius, below 1 if it converges. With ``overlap`` and ``mixing`` 0 it is that of DiLoCo.

    Args:
        kappa: how far a round of local training goes, as a share of the distance to the optimum, in (0, 1].
            Without overlap also above 1, where it overshoots.
        lr: outer learning rate.
        momentum: outer Nesterov momentum.
        mixing: alpha, the share of its own weight that a replica keeps.
        overlap: tau/H.
    """
    late = (1 - kappa) ** overlap if overlap else 1.0
    rest = (1 - kappa) ** (1 - overlap)
    pseudo_gradient = np.array([1.0, 0.0, -1.0])  # coordinates: anchor, momentum, weight
    velocity = pseudo_gradient + momentum * np.array([0.0, 1.0, 0.0])
    anchor = np.array([1.0, 0.0, 0.0]) - lr * (pseudo_gradient + momentum * velocity)
    weight = rest * (mixing * late * np.array([0.0, 0.0, 1.0]) + (1 - mixing) * anchor)
    return float(np.abs(np.linalg.eigvals(np.stack([anchor, velocity, weight]))).max())


def mixing_bound(lr: float, momentum: float, mixing: float, overlap: float) -> float:
    """The kappa up to which :func:`mixing_radius` stays below 1, in steps of 1/512; 1.0 if it always does.
    Local training reaches kappa near 1 along steep directions, so anything less calls for a lower
    outer learning rate or momentum."""
    stable = 0.0
    for k in range(1, _GRID + 1):
        if mixing_radius(k / _GRID, lr, momentum, mixing, overlap) >= 1:
            return stable
        stable = k / _GRID
    return stable

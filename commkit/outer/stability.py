"""Which outer settings converge, and how often it is worth to communicate: pure arithmetic.

All bounds are of the linearised, noise-free recursion. ``kappa`` is how far one round of local training
goes along a direction, as a share of its distance from the optimum: 1 reaches it, 2 overshoots to the other
side. Noise and curvature only make stability worse, so a setting outside a bound is wrong, while one close
below it may still be.
"""

from __future__ import annotations

import math

import numpy as np

# Relative width to which the largest kappa is bisected.
_PRECISION = 1e-12


def noloco_bound(alpha: float, group_size: int = 2) -> float:
    """The consensus weight gamma must stay below this for the replicas of NoLoCo to stay together.

    The smaller of the mean-square bound ``2 (1 - alpha^2) / (1 + alpha - 2 alpha (n-1)/n)``, for pairs
    ``2 (1 - alpha^2)``, and of the upper end of the band that the paper gives.

    Args:
        alpha: momentum of the outer step, in [0, 1).
        group_size: n, how many replicas average in a round; 1 has nothing to agree on but its own past.

    Raises:
        ValueError: alpha or group_size out of range.
    """
    _require_momentum("alpha", alpha)
    if group_size < 1:
        raise ValueError(f"group_size={group_size} must be >= 1; use 2 for pairs")
    share = (group_size - 1) / group_size
    bound = 2 * (1 - alpha**2) / (1 + alpha - 2 * alpha * share)
    return min(bound, noloco_band(alpha, group_size)[1])


def noloco_band(alpha: float, group_size: int = 2) -> tuple[float, float]:
    """The band of gamma that the NoLoCo paper recommends,
    ``sqrt(n / (2(n-1))) alpha`` to ``sqrt(n (2 + alpha^2) / (2(n-1)))``. Its lower end is not needed for
    stability; its upper end is too wide for alpha above 0.5 in pairs, hence :func:`noloco_bound`.
    """
    if group_size < 2:
        return 0.0, math.inf
    factor = math.sqrt(group_size / (2 * (group_size - 1)))
    return factor * alpha, factor * math.sqrt(2 + alpha**2)


def check_gamma(gamma: float, alpha: float, group_size: int = 2) -> None:
    """Refuse a consensus weight that drives NoLoCo's replicas apart.

    Raises:
        ValueError: gamma is not in (0, :func:`noloco_bound`).
    """
    bound = noloco_bound(alpha, group_size)
    if not 0 < gamma < bound:
        raise ValueError(
            f"gamma={gamma} must be above 0 and below {bound:.4g} for alpha={alpha} and groups of {group_size}, or "
            "the replicas drift apart; use for example alpha=0.5 with gamma=0.7"
        )


def largest_stable_kappa(lr: float, momentum: float, delay: int, nesterov: bool = True) -> float:
    """The largest kappa up to which an outer step converges that uses pseudo-gradients ``delay`` rounds old.

    With ``g = kappa * phi`` of ``delay`` rounds ago the step (torch's SGD) has the characteristic polynomial
    ``z^delay (z-1)(z-m) + lr kappa ((1+m) z - m)``, or ``lr kappa z`` for heavy-ball momentum; it converges
    while all roots are inside the unit circle. What to do with it: local training commonly has kappa up to
    1 along the steepest directions, so a result below 1 calls for less momentum.

    Args:
        lr: outer learning rate, above 0.
        momentum: outer momentum m, in [0, 1).
        delay: 0 for synchronous methods, 1 for those one round late.
        nesterov: Nesterov momentum, else heavy-ball.

    Raises:
        ValueError: a value out of range.
    """
    _require_positive("lr", lr)
    _require_momentum("momentum", momentum)
    if delay < 0:
        raise ValueError(f"delay={delay} must be >= 0; use 1 for methods that are one round late")

    def stable(kappa: float) -> bool:
        return spectral_radius(kappa, lr, momentum, delay, nesterov) < 1

    # Small kappa are stable, and a root that has left the circle stays outside, as all but one of them
    # go to infinity with kappa.
    low, high = 0.0, 1e-3 * (1 - momentum) / lr
    while stable(high):
        low, high = high, 1.1 * high
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        low, high = (middle, high) if stable(middle) else (low, middle)
    return low


def spectral_radius(
    kappa: float, lr: float, momentum: float, delay: int, nesterov: bool = True
) -> float:
    """How the error of a direction shrinks per round in the long run, see :func:`largest_stable_kappa`."""
    polynomial = np.zeros(delay + 3)
    polynomial[:3] = 1, -(1 + momentum), momentum
    if nesterov:
        polynomial[-2:] += lr * kappa * np.array([1 + momentum, -momentum])
    else:
        polynomial[-2] += lr * kappa
    return float(np.abs(np.roots(polynomial)).max())


def co2_is_stable(alpha: float, beta: float, staleness_gap: float, kappa: float = 1.0) -> bool:
    """Whether CO2's recursion, one round late with heavy-ball momentum, converges:
    ``alpha kappa / Lambda + beta < 1``.

    Args:
        alpha: outer learning rate, above 0.
        beta: outer momentum, in [0, 1).
        staleness_gap: Lambda, by which pseudo-gradients are divided, above 0.
        kappa: see the module's text; 1 covers local training that reaches the optimum.

    Raises:
        ValueError: a value out of range.
    """
    for name, value in (("alpha", alpha), ("staleness_gap", staleness_gap), ("kappa", kappa)):
        _require_positive(name, value)
    _require_momentum("beta", beta)
    return alpha * kappa / staleness_gap + beta < 1


def co2_floor(alpha: float, beta: float) -> float:
    """A staleness gap that is stable for all kappa up to 1, with a tenth to spare: ``1.1 alpha / (1-beta)``.

    Raises:
        ValueError: a value out of range.
    """
    _require_positive("alpha", alpha)
    _require_momentum("beta", beta)
    return 1.1 * alpha / (1 - beta)


def utilisation(
    sync_every: int, step_seconds: float, comm_seconds: float, overlap_steps: float = 0
) -> float:
    """The share of time that goes into training, in (0, 1].

    Args:
        sync_every: H, inner steps per round.
        step_seconds: of one inner step.
        comm_seconds: of one round's communication.
        overlap_steps: steps during which it is hidden: 0 for blocking methods, tau for Streaming DiLoCo,
            ``math.inf`` (in fact H) for methods that are one round late.

    Raises:
        ValueError: a value out of range.
    """
    if sync_every < 1:
        raise ValueError(f"sync_every={sync_every} must be >= 1")
    _require_times(step_seconds, comm_seconds, overlap_steps)
    train = sync_every * step_seconds
    exposed = comm_seconds - min(overlap_steps, sync_every) * step_seconds
    return train / (train + max(0.0, exposed))


def smallest_sync_every(
    target: float, step_seconds: float, comm_seconds: float, overlap_steps: float = 0
) -> int:
    """The smallest H whose :func:`utilisation` reaches ``target``. The honest way to choose H: more local
    steps than this cost quality and save nothing that matters.

    Raises:
        ValueError: target is not in (0, 1), or a time out of range.
    """
    if not 0 < target < 1:
        raise ValueError(f"target={target} must be above 0 and below 1; use for example 0.95")
    _require_times(step_seconds, comm_seconds, overlap_steps)
    low, high = 0, 1
    while utilisation(high, step_seconds, comm_seconds, overlap_steps) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        enough = utilisation(middle, step_seconds, comm_seconds, overlap_steps) >= target
        low, high = (low, middle) if enough else (middle, high)
    return high


def _require_times(step_seconds: float, comm_seconds: float, overlap_steps: float) -> None:
    _require_positive("step_seconds", step_seconds)
    if not 0 <= comm_seconds < math.inf:
        raise ValueError(f"comm_seconds={comm_seconds} must be >= 0 and finite")
    if not overlap_steps >= 0:
        raise ValueError(f"overlap_steps={overlap_steps} must be >= 0; use 0 for blocking methods")


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value} must be above 0 and finite")


def _require_momentum(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value} must be in [0, 1); use for example 0.5")

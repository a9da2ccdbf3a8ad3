"""Is the batch large enough? Tests of the gradients that the workers of a group hold, and what follows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Comm

# Below this share of its workers' squared gradients, a mean gradient is nothing but rounding.
_NOTHING = 1e-12


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How a worker makes one optimizer step: ``accumulation`` backward passes over ``micro_batch`` samples,
    each loss divided by ``accumulation``."""

    micro_batch: int
    accumulation: int = 1

    @property
    def samples(self) -> int:
        """Per worker and optimizer step."""
        return self.micro_batch * self.accumulation


def plan_batch(
    requested: int, max_micro_batch: int, switch_at: float = 2.0, max_batch: int | None = None
) -> BatchPlan:
    """AdLoCo's switch mode: accumulate only if the request is far above what fits.

    Up to ``switch_at * max_micro_batch`` samples a step is one micro-batch, truncated to what fits; above,
    it is as many full micro-batches as it takes.

    Args:
        requested: samples per worker and step.
        max_micro_batch: the most that fits into memory; see :func:`largest_micro_batch`.
        switch_at: s >= 1. At 1 every request above ``max_micro_batch`` accumulates; higher values save the
            time of a second pass for a request that is little above.
        max_batch: never more than this, such as the worker's share of the data; at least one micro-batch.
    """
    if requested <= switch_at * max_micro_batch:
        return BatchPlan(min(requested, max_micro_batch))
    passes = math.ceil(requested / max_micro_batch)
    if max_batch is not None:
        passes = min(passes, max(1, max_batch // max_micro_batch))
    return BatchPlan(max_micro_batch, passes)


def largest_micro_batch(fits: Callable[[int], bool], limit: int, keep: float = 0.85) -> int:
    """The largest micro-batch that fits, by bisection, less some room for what varies.

    Args:
        fits: tries a batch: runs forward, backward and step, frees it, and says whether memory sufficed (False
            on ``torch.cuda.OutOfMemoryError``).
        limit: the most that is tried.
        keep: share of the largest that is used, in (0, 1]; 0.85 leaves room for fragmentation.

    Raises:
        ValueError: not even one sample fits, or a value out of range.
    """
    if limit < 1 or not 0 < keep <= 1:
        raise ValueError(f"limit={limit} must be >= 1 and keep={keep} in (0, 1]; use keep=0.85")
    if not fits(1):
        raise ValueError(
            "not even one sample fits into memory; use a smaller model or activation checkpointing"
        )
    low, high = 1, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return max(1, int(keep * low))


class BatchTest(ABC):
    """Says how many samples per worker and step the gradients of M workers call for. A frozen dataclass
    that is its own configuration."""

    def request(self, gradients: list[Tensor], samples: int, comm: Comm) -> int | None:
        """Collective over ``comm``: one all-reduce of the gradient's size and one of a few scalars.

        Args:
            gradients: this worker's mean gradient over ``samples``, tensor by tensor; not modified.
            samples: per worker; the same on all.
            comm: the M workers.

        Returns:
            Samples per worker, the same on all; None if nothing can be said: one worker alone, a gradient
            that is not finite somewhere, or one whose mean vanishes.
        """
        if comm.world_size < 2:
            return None
        flat = torch.cat([x.detach().reshape(-1).float() for x in gradients])
        mean = comm.all_reduce(flat / comm.world_size)
        sums = comm.all_reduce(_scalars(flat, mean))
        squares, deviation, along = (float(x) for x in sums)
        norm = _dot(mean, mean)
        if not all(map(math.isfinite, (norm, squares, deviation, along))):
            return None
        if norm <= _NOTHING * squares / comm.world_size:
            return None
        scale = samples / (comm.world_size - 1)  # of variances per sample
        variance = scale * deviation
        bias = variance / (comm.world_size * samples)
        wanted = self.total(variance, scale * along, norm, bias) / comm.world_size
        # Decided by one: a sum may differ in its last bit between ranks on some backends.
        request = torch.tensor([max(1.0, min(wanted, 2.0**52))], dtype=torch.float64)
        return math.ceil(float(comm.broadcast(request.to(flat.device), 0)))

    @abstractmethod
    def total(self, variance: float, along: float, norm: float, bias: float) -> float:
        """Samples per step of all workers together.

        Args:
            variance: of a sample's gradient, ``E |g_i - g|^2``.
            along: of its inner product with the mean, ``E (<g_i, g> - |g|^2)^2``.
            norm: ``|g|^2`` of the mean gradient; above 0.
            bias: by which ``norm`` is too large in expectation, as it holds the mean's own noise.
        """


@dataclass(frozen=True)
class NormTest(BatchTest):
    """The norm test (Byrd et al. 2012): the error of the mean gradient is to be at most ``eta`` of its norm,
    ``b = V / (M eta^2 |g|^2)`` with the variance per sample ``V = b/(M-1) sum_m |g_m - g|^2``.

    Args:
        eta: 0.3 to 0.9 in the literature, 0.1 in AdLoCo's published settings. b grows with 1/eta^2: raise it
            if batches grow faster than the loss falls.
        corrected: ``|g|^2`` of the mean of few samples is too large by ``V/(M b)``; take that off, at most
            99 percent. Batches then grow earlier where noise dominates.

    Raises:
        ValueError: ``eta`` not above 0.
    """

    eta: float = 0.1
    corrected: bool = False

    def __post_init__(self) -> None:
        _require_positive("eta", self.eta, 0.3)

    def total(self, variance: float, along: float, norm: float, bias: float) -> float:
        if self.corrected:
            norm = max(norm - bias, 0.01 * norm)
        return variance / (self.eta**2 * norm)


@dataclass(frozen=True)
class InnerProductTest(BatchTest):
    """The augmented inner-product test (Bollapragada et al. 2018): that the mean gradient is a direction of
    descent matters more than its error across. The larger of

        Var <g_i, g> / (theta^2 |g|^4)    and    Var (g_i - <g_i, g>/|g|^2 g) / (nu^2 |g|^2).

    Args:
        theta: 0.9 in the paper. Smaller is larger batches.
        nu: 5.84 in the paper: a long way off orthogonal to the mean gradient is allowed.

    Raises:
        ValueError: ``theta`` or ``nu`` not above 0.
    """

    theta: float = 0.9
    nu: float = 5.84

    def __post_init__(self) -> None:
        _require_positive("theta", self.theta, 0.9)
        _require_positive("nu", self.nu, 5.84)

    def total(self, variance: float, along: float, norm: float, bias: float) -> float:
        across = max(0.0, variance - along / norm)  # Pythagoras
        return max(along / (self.theta**2 * norm**2), across / (self.nu**2 * norm))


def _scalars(own: Tensor, mean: Tensor) -> Tensor:
    """(3,) float64: ``|g_m|^2``, ``|g_m - g|^2`` and ``(<g_m, g> - |g|^2)^2``."""
    error = own - mean
    return torch.tensor(
        [_dot(own, own), _dot(error, error), _dot(error, mean) ** 2],
        dtype=torch.float64,
        device=own.device,
    )


def _dot(x: Tensor, y: Tensor) -> float:
    return float(torch.dot(x.double(), y.double()))


def _require_positive(name: str, value: float, usual: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value} must be above 0 and finite; use {usual}")

"""PowerSGD with error feedback for all ranks at once, in float64 and without any of the library's code.

Algorithms 1 and 2 of Vogels et al. 2019, with the residual of each rank taken against what that rank itself
contributed (P Q_r^T), and Q carried over unscaled.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class PowerSGDModel:
    """One matrix of ``world_size`` ranks; ``q`` is (columns, rank)."""

    q: torch.Tensor
    world_size: int
    residuals: list[torch.Tensor | float] = field(default_factory=list)

    def step(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """The estimate of the mean gradient that all ranks apply."""
        residuals = self.residuals or [0.0] * self.world_size
        deltas = [g.double() + e for g, e in zip(gradients, residuals, strict=True)]
        p = sum(delta @ self.q for delta in deltas) / self.world_size
        p = torch.linalg.qr(p).Q
        qs = [delta.T @ p for delta in deltas]
        self.residuals = [delta - p @ q.T for delta, q in zip(deltas, qs, strict=True)]
        self.q = sum(qs) / self.world_size
        return p @ self.q.T


@dataclass
class AlternatingModel:
    """The one-all-reduce variant: each step orthonormalises the factor of the step before and finds the
    other. ``p`` is (rows, rank) and used at even steps, ``q`` (columns, rank) is found there."""

    p: torch.Tensor
    world_size: int
    steps: int = 0
    q: torch.Tensor | None = None
    residuals: list[torch.Tensor | float] = field(default_factory=list)

    def step(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """The estimate of the mean gradient that all ranks apply."""
        residuals = self.residuals or [0.0] * self.world_size
        deltas = [g.double() + e for g, e in zip(gradients, residuals, strict=True)]
        if self.steps % 2 == 0:
            basis = torch.linalg.qr(self.p).Q
            sent = [basis @ (basis.T @ delta) for delta in deltas]
            self.q = sum(delta.T @ basis for delta in deltas) / self.world_size
        else:
            assert self.q is not None
            basis = torch.linalg.qr(self.q).Q
            sent = [delta @ basis @ basis.T for delta in deltas]
            self.p = sum(delta @ basis for delta in deltas) / self.world_size
        self.residuals = [delta - own for delta, own in zip(deltas, sent, strict=True)]
        self.steps += 1
        return sum(sent) / self.world_size

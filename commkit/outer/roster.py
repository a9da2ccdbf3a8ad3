"""Who contributes what to one round."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Comm


def require_same_round(numbers: Tensor) -> None:
    """
    Args:
        numbers: of the round that each rank is in.

    Raises:
        RuntimeError: they differ.
    """
    rounds = [int(number) for number in numbers]
    if len(set(rounds)) > 1:
        raise RuntimeError(
            f"ranks are in different rounds, {rounds}: they must take the same number of optimizer steps; "
            "with a GradScaler, whose skipped steps no hook sees, call after_step() yourself"
        )


@dataclass(frozen=True, slots=True)
class Roster:
    """Equal on all ranks.

    Args:
        weights: of each rank's contribution; 0 where it is left out.
    """

    weights: tuple[float, ...]

    @classmethod
    def call(
        cls, comm: Comm, round_number: int, weight: float, device: torch.device | None = None
    ) -> Roster:
        """Collective over ``comm``.

        Raises:
            RuntimeError: on every rank, if they are not in the same round.
        """
        own = torch.tensor([float(round_number), weight], dtype=torch.float64, device=device)
        told = comm.all_gather(own).cpu()
        require_same_round(told[:, 0])
        return cls(tuple(told[:, 1].tolist()))

    @property
    def num_contributors(self) -> int:
        return sum(weight > 0 for weight in self.weights)

    @property
    def first(self) -> int:
        """The lowest rank that contributes."""
        return next(rank for rank, weight in enumerate(self.weights) if weight > 0)

    def share(self, rank: int) -> float:
        """The factor that turns the plain mean over all ranks into the weighted one. Exactly 1 where all
        weights are equal."""
        if len(set(self.weights)) == 1:
            return 1.0
        return len(self.weights) * self.weights[rank] / sum(self.weights)

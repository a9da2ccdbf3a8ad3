"""A2CiD2: gossip of pairs whose every rank keeps a second copy, which carries momentum between meetings.

Only the arithmetic of one rank is here; who meets whom, and when, is the method's that uses it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import StateDict
from .topologies.base import Matrix
from .topologies.rates import gossip_constants


@dataclass(frozen=True, slots=True)
class AcidCoefficients:
    """What the graph decides (Nabli, Belilovsky and Oyallon 2023).

    Args:
        eta: how fast the copies mix, per duration of a gradient step.
        alpha: how far a meeting moves the second copy; 1/2 is what it moves the first.

    Raises:
        ValueError: eta < 0 or alpha <= 0.
    """

    eta: float
    alpha: float

    def __post_init__(self) -> None:
        if not 0 <= self.eta < math.inf:
            raise ValueError(f"eta={self.eta} must be >= 0 and finite; use 0 for plain AD-PSGD")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha} must be above 0 and finite; use 0.5 with eta=0")

    @classmethod
    def of(cls, rates: Matrix) -> AcidCoefficients:
        """``eta = 1 / (2 sqrt(chi1 chi2))``, ``alpha = sqrt(chi1 / chi2) / 2``. The gain is largest on poorly
        connected graphs such as rings; a complete graph has nothing to accelerate.

        Args:
            rates: (n, n) meetings of each pair per duration of a gradient step, see
                :func:`~commkit.outer.topologies.rates.pair_rates`.

        Raises:
            ValueError: fewer than two ranks, or ranks that cannot reach each other.
        """
        constants = gossip_constants(rates)
        return cls(
            eta=1 / (2 * math.sqrt(constants.chi1 * constants.chi2)),
            alpha=math.sqrt(constants.chi1 / constants.chi2) / 2,
        )


AD_PSGD = AcidCoefficients(eta=0.0, alpha=0.5)
"""No momentum: the pair averages of asynchronous decentralised parallel SGD (Lian et al. 2018)."""


class AcidState:
    """One rank's parameters and their second copy: 4 bytes per parameter (8 of float64), in at least float32.

    Before every event, gradient or meeting, :meth:`mix` must be called with the time since the last one.
    Whoever does both in threads holds a lock over mix and event together. Over all ranks
    ``sum(x + x~)`` is conserved by mixing and meetings whatever the ranks' clocks.

    Args:
        params: the live parameters, changed in place. The copy starts equal to them.
        coefficients: of the graph; equal on all ranks.
    """

    def __init__(self, params: Sequence[Tensor], coefficients: AcidCoefficients) -> None:
        self.params = list(params)
        self.coefficients = coefficients
        self.copies = [
            p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for p in self.params
        ]

    @torch.no_grad()
    def mix(self, elapsed: float) -> None:
        """Let ``elapsed`` pass, in durations of a gradient step.

        Raises:
            ValueError: it is negative.
        """
        if not 0 <= elapsed < math.inf:
            raise ValueError(
                f"elapsed={elapsed} must be >= 0 and finite; clocks do not run backwards"
            )
        share = -math.expm1(-2 * self.coefficients.eta * elapsed) / 2
        if share == 0:
            return
        for p, copy in zip(self.params, self.copies, strict=True):
            moved = (copy - p).mul_(share)
            p.copy_(p + moved)
            copy.sub_(moved)

    @torch.no_grad()
    def step(self, directions: Sequence[Tensor], lr: float) -> None:
        """A gradient event: the same step, e.g. an optimizer's, on both copies."""
        for p, copy, d in zip(self.params, self.copies, directions, strict=True):
            p.sub_(d, alpha=lr)
            copy.sub_(d, alpha=lr)

    @torch.no_grad()
    def meet(self, peer: Sequence[Tensor]) -> None:
        """A meeting, which both sides make at the same time.

        Args:
            peer: the other rank's parameters, after its own :meth:`mix` up to now, as this rank's are.
        """
        for p, copy, other in zip(self.params, self.copies, peer, strict=True):
            difference = p.to(copy.dtype) - other
            p.copy_(p - difference / 2)
            copy.sub_(difference, alpha=self.coefficients.alpha)

    def state_dict(self) -> StateDict:
        """The copies by place; time since the last event is the caller's."""
        return {str(i): copy.clone() for i, copy in enumerate(self.copies)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the copies.

        Raises:
            ValueError: other tensors than :meth:`state_dict` gives.
        """
        shapes = {str(i): copy.shape for i, copy in enumerate(self.copies)}
        if shapes != {key: value.shape for key, value in state.items()}:
            raise ValueError(
                f"the state has {len(state)} tensors that do not fit the model's {len(self.copies)}; resume "
                "with the model that saved them"
            )
        for i, copy in enumerate(self.copies):
            copy.copy_(state[str(i)])

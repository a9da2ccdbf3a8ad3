"""Momentum correction: sparse messages accumulate the velocity, not the gradient (Deep Gradient
Compression)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..ops import correct_momentum_, two_norm
from ..registry import register
from ..types import Compressor, CorrectsMomentum, Payload, StateDict, TensorCtx
from .staged import StagedTensors, joined, parted, recycled

_VELOCITY = "velocity"


@register("feedback", "momentum_correction")
@dataclass(slots=True)
class MomentumCorrection:
    """``u = mu u + g; v = v + u; send C(v); v = v - sent; u = 0 where something was sent`` (Lin et al.
    2018, equations 4 and 5, algorithm 4).

    It takes the place of the optimizer's momentum, which must be 0. State: the velocity u and the unsent v,
    8 bytes per compressed element, and as much again between a reduction and the end of its step; on a CPU
    for good, since fresh memory in every step would cost more than the arithmetic.

    Args:
        momentum: mu, the optimizer's momentum of a dense run.
        nesterov: ``u = mu (u + g); v = v + u + g``.
        masking: momentum factor masking: coordinates just sent lose their velocity, so that stale momentum
            does not push them on. Off, nothing is ever lost: sum of sent plus v is the sum of all u.

    Raises:
        ValueError: momentum outside [0, 1).
    """

    momentum: float = 0.9
    nesterov: bool = False
    masking: bool = True
    _unsent: StagedTensors = field(default_factory=recycled, init=False, repr=False)
    _velocity: StagedTensors = field(default_factory=recycled, init=False, repr=False)
    # Where a velocity comes from that dense steps have built up; the optimizer's business.
    initial_velocity: Callable[[str], Tensor | None] = field(
        default=lambda key: None, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must be in [0, 1); use for example 0.9")

    @property
    def needs_contraction(self) -> bool:
        return True

    @property
    def changes_mean(self) -> bool:
        return False

    def holds(self, key: str) -> bool:
        return key in self._unsent or key in self._velocity

    def compensate(self, x: Tensor, key: str) -> Tensor:
        before, after = self._before(x, key), self._after(x, key)
        u, v = (y.view(-1) for y in after)
        velocity, unsent = map(_flat, before)
        correct_momentum_(u, v, x.reshape(-1), velocity, unsent, self.momentum, self.nesterov)
        self._velocity.stage(key, after[0])
        return after[1]

    def send(self, x: Tensor, key: str, compressor: Compressor, ctx: TensorCtx) -> Payload | None:
        """The fused path: compensate, compress, and stage what is left unsent, in one pass. The payload; None
        if the compressor has no such path for this tensor, and then nothing was done."""
        if not isinstance(compressor, CorrectsMomentum) or not compressor.corrects(ctx):
            return None
        before, after = self._before(x, key), self._after(x, key)
        payload = compressor.correct_and_compress(
            x, before, after, self.momentum, self.nesterov, self.masking, ctx
        )
        self._velocity.stage(key, after[0])
        self._unsent.stage(key, after[1])
        return payload

    def _before(self, x: Tensor, key: str) -> tuple[Tensor | None, Tensor | None]:
        velocity = self._velocity.get_like(key, x, "velocity")
        if velocity is None:
            velocity = self.initial_velocity(key)
        return velocity, self._unsent.get_like(key, x, "unsent")

    def _after(self, x: Tensor, key: str) -> tuple[Tensor, Tensor]:
        return self._velocity.fresh(key, x), self._unsent.fresh(key, x)

    def update(self, compensated: Tensor, sent: Tensor, key: str) -> None:
        """Stage what is unsent, in the memory of ``compensated``, and the masked velocity."""
        velocity = self._velocity.staged(key)
        assert velocity is not None, "compensate() comes first"
        if self.masking:
            velocity.masked_fill_(sent != 0, 0)
        self._unsent.stage(key, None if sent is compensated else compensated.sub_(sent))

    def stage(self, key: str, unsent: Tensor, places: Tensor) -> None:
        """Stage what a fused path has worked out: ``unsent``, and the flat places that were sent."""
        velocity = self._velocity.staged(key)
        assert velocity is not None, "compensate() comes first"
        if self.masking:
            velocity.view(-1).index_fill_(0, places.long(), 0)
        self._unsent.stage(key, unsent)

    def deliver(self, mean: Tensor, key: str) -> Tensor:
        return mean

    def release(self, x: Tensor, key: str) -> Tensor:
        """The last message of a tensor, with everything unsent. Its velocity ends here: the momentum of
        dense steps is the optimizer's and starts anew."""
        whole = self.compensate(x, key)
        self._unsent.stage(key, None)
        self._velocity.stage(key, None)
        return whole

    def commit(self, ok: bool) -> None:
        self._unsent.commit(ok)
        self._velocity.commit(ok)

    def norm(self) -> float:
        return math.hypot(*(float(two_norm(v)) for v in self._unsent.values()))

    def state_dict(self) -> StateDict:
        """The unsent by parameter name, and ``velocity::NAME``."""
        return joined(self._unsent, {_VELOCITY: self._velocity})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        parted(state, self._unsent, {_VELOCITY: self._velocity})


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1)

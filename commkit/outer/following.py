"""Local updates among workers that may be lost and joined by others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..membership import Elastic
from ..runtime.redealing import for_everybody
from .base import OuterSync
from .co2 import CO2
from .diloco import DiLoCo
from .edit import EDiT
from .noloco import NoLoCo
from .streaming import StreamingDiLoCo

_SERVED: tuple[type[OuterSync], ...] = (CO2, DiLoCo, EDiT, NoLoCo, StreamingDiLoCo)


def follow_members(method: OuterSync, members: Elastic) -> None:
    """Let ``method``, not yet started, go on with those who are left when workers are lost: the round in which that is
    noticed is made anew by them, and local progress stays. A worker that joins begins with the anchors of the others and
    the weights of one of them, and contributes to the round after the next.

    A fragment that travelled is sent anew, as it is when its outcome was to be used; what CO2 had sent, as it was sent; of
    EDiT's round, the layers that do not count yet. Rounds of NoLoCo end with one small all-reduce, which they have not else,
    so that those who are left stay in the same round.

    Raises:
        TypeError: a method with rounds of another kind.
        ValueError: a warm-up, whose averages no round protects.
    """
    kind = type(method)
    own = kind.carry_out is OuterSync.carry_out and kind.synchronise is OuterSync.synchronise
    plain = own and method.anchored and not any(method.delay(unit) for unit in method.units)
    if not plain and kind not in _SERVED:
        raise TypeError(
            f"{kind.__name__} cannot go on without a worker in the middle of a round; use LocalSGD with a reducer, "
            f"{', '.join(sorted(each.__name__ for each in _SERVED))}, or leave members out"
        )
    if method.options.warmup_steps:
        raise ValueError(
            f"warmup_steps={method.options.warmup_steps} must be 0 with members: a loss in the warm-up is survived by "
            "schemes that reduce at every step"
        )
    method.members = members


class Follower:
    """A method at work, as :class:`~commkit.Elastic` wants what is attached."""

    rounds = True

    def __init__(self, method: OuterSync) -> None:
        self._method = method

    def give_up(self) -> None:
        """Nothing: an aborted round has undone itself."""

    def rebuild(self) -> None:
        if self._method.started:
            self._method.rebuild(None)
        else:
            self._method.start()

    def shared_state_dict(self) -> dict[str, Any]:
        """Of a worker between rounds, or about to make one."""
        return {
            "method": self._method.state_dict(),
            "reducer": for_everybody(self._method.reducer.state_dict()),
            "unit": self._method.at_unit,
            "late": self._method.late,
        }

    state_dict = shared_state_dict

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._method.load_state_dict(state["method"])
        self._method.reducer.load_state_dict(state["reducer"])
        self._method.at_unit, self._method.late = state["unit"], state["late"]
        self._method.newcomer = self._method.mid_round

    def catch_up(self) -> bool:
        """Make the rounds that the others are about to make, after the state was received. False: there are none."""
        first = self._method.at_unit
        if first is None:
            return False
        if self._method.late:
            self._method.make_round(self._method.units[first], late=True)
            return True
        for unit in self._method.due():
            if unit.index >= first:
                self._method.make_round(unit)
        return True

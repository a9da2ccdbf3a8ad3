"""Local updates among workers that may be lost and joined by others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..membership import Elastic
from ..runtime.redealing import for_everybody
from .base import OuterSync


def follow_members(method: OuterSync, members: Elastic) -> None:
    """Let ``method``, not yet started, go on with those who are left when workers are lost: the round in which that is
    noticed is made anew by them, and local progress stays. A worker that joins begins with the anchors of the others and
    the weights of one of them, and contributes to the round after the next.

    Raises:
        TypeError: a method with rounds of another kind.
        ValueError: a warm-up, whose averages no round protects.
    """
    kind = type(method)
    own = kind.carry_out is OuterSync.carry_out and kind.synchronise is OuterSync.synchronise
    if not own or not method.anchored or any(method.delay(unit) for unit in method.units):
        raise TypeError(
            f"{kind.__name__} cannot go on without a worker in the middle of a round; use DiLoCo or LocalSGD with a "
            "reducer, or leave members out"
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
        }

    state_dict = shared_state_dict

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._method.load_state_dict(state["method"])
        self._method.reducer.load_state_dict(state["reducer"])
        self._method.at_unit = state["unit"]
        self._method.newcomer = state["unit"] is not None

    def catch_up(self) -> bool:
        """Make the rounds that the others are about to make, after the state was received. False: there are none."""
        first = self._method.at_unit
        if first is None:
            return False
        for unit in self._method.due():
            if unit.index >= first:
                self._method.make_round(unit)
        return True

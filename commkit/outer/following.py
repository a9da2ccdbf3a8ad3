"""Local updates among workers that may be lost and joined by others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..membership import Elastic
from ..runtime.redealing import for_everybody
from .a2cid2 import A2CiD2
from .a_edit import AEDiT
from .adloco import AdLoCo
from .base import OuterSync
from .co2 import CO2
from .decentralised import Decentralised
from .dfedsam import DFedSAM
from .diloco import DiLoCo
from .dilocox import DiLoCoX
from .edit import EDiT
from .gossip import GossipSGD
from .local_sgd import LocalSGD
from .monna import MoNNA
from .noloco import NoLoCo
from .push_sum import PushSum
from .streaming import StreamingDiLoCo

_SERVED: tuple[type[OuterSync], ...] = (
    A2CiD2,
    AdLoCo,
    CO2,
    DFedSAM,
    DiLoCo,
    DiLoCoX,
    EDiT,
    GossipSGD,
    LocalSGD,
    MoNNA,
    NoLoCo,
    PushSum,
    StreamingDiLoCo,
)


def follow_members(method: OuterSync, members: Elastic) -> None:
    """Let ``method``, not yet started, go on with those who are left when workers are lost: the round in which that is
    noticed is made anew by them, and local progress stays. A worker that joins begins with the anchors of the others and
    the weights of one of them, and contributes to the round after the next; where there are no anchors to be measured from,
    as in gossip, to the next.

    A fragment that travelled is sent anew, as it is when its outcome was to be used; what CO2 and DiLoCoX had sent, as it
    was sent; of EDiT's round, the layers that do not count yet. Rounds of the methods without a collective end with one small
    all-reduce, which they have not else: those who are left stay in the same round, and nobody has mixed with a lost rank
    where others have not. Topologies and pairs are then laid over those who are left.

    Raises:
        TypeError: a method with rounds of another kind.
        ValueError: a warm-up, whose averages no round protects, or several trainers.
    """
    kind = type(method)
    own = kind.carry_out is OuterSync.carry_out and kind.synchronise is OuterSync.synchronise
    plain = own and method.anchored and not any(method.delay(unit) for unit in method.units)
    if kind is AEDiT:
        raise TypeError(
            "AEDiT cannot go on without a worker: its rounds go by the clock, so that workers are at different steps, and one "
            "that joins is at none; use EDiT, or leave members out"
        )
    if not plain and kind not in _SERVED:
        raise TypeError(
            f"{kind.__name__} is not known to survive a loss in the middle of a round; use "
            f"{', '.join(each.__name__ for each in _SERVED)}, or leave members out"
        )
    if isinstance(method, AdLoCo) and method.num_trainers > 1:
        raise ValueError(
            f"trainers={method.num_trainers} must be 1 with members: a merger of trainers that a loss interrupts is not "
            "undone, and a trainer may lose all its workers; use 1"
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

    def refusal(self, world_size: int) -> str:
        return self._method.refusal(world_size)

    def shared_state_dict(self) -> dict[str, Any]:
        """Of a worker between rounds, or about to make one."""
        return {
            "method": self._method.state_dict(),
            "reducer": for_everybody(self._method.reducer.state_dict()),
            "unit": self._method.at_unit,
            "late": self._method.late,
            "merging": self._method.merging,
        }

    state_dict = shared_state_dict

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._method.load_state_dict(state["method"])
        self._method.reducer.load_state_dict(state["reducer"])
        self._method.at_unit, self._method.late = state["unit"], state["late"]
        self._method.merging = state["merging"]
        self._method.newcomer = self._method.mid_round

    def catch_up(self) -> bool:
        """Make the rounds that the others are about to make, after the state was received. False: there are none."""
        if isinstance(self._method, Decentralised) and self._method.merging:
            self._method.merge()  # and so begins with the mean
            return False
        first = self._method.at_unit
        if first is None:
            return False
        due = self._method.due()
        if self._method.late:  # new rounds come after it, unless they have begun, as at the end
            due = [unit for unit in due if self._method.is_open(unit)]
            self._method.make_round(self._method.units[first], late=True)
        else:
            due = [unit for unit in due if unit.index >= first]
        for unit in due:
            self._method.make_round(unit)
        return True

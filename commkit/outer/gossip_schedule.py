"""When gossip is worth its bytes: little, and late."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from .permutation import uniform
from .topologies import Mixing, Neighbours

Mode: TypeAlias = Literal["none", "gossip", "merge"]
_MODES = ("none", "gossip", "merge")
_COIN = 0x5EED


@dataclass(frozen=True, slots=True)
class GossipSchedule:
    """In which rounds there is communication: a function of seed and round, equal on all ranks.

    With a fixed budget communicate late: 16 to 32 nodes with very different data that met one random peer every
    fifth round, and were merged once at the end, came near to averaging in each round; without any meeting
    before, the merged model is useless ("A single global merging suffices", 2025). That merge is
    ``options.final_sync`` of the method, on by default.

    Args:
        p_gossip: how likely two ranks that the topology brings together really meet; 0.2 is the paper's. A coin is
            thrown for each pair. Where links are one-way it is thrown for all ranks together, since leaving out
            single messages would not keep the mean. 1 is every round.
        windows: ``[first, last + 1, mode]`` of rounds with a rule of their own: "none", "gossip" (each
            round), "merge" (the mean of all ranks, in place of gossip). The first that holds a round counts.
        seed: of the coins; equal on every rank.

    Raises:
        ValueError: ``p_gossip`` outside [0, 1], or a window that is none.
    """

    p_gossip: float = 0.2
    windows: Sequence[tuple[int, int, Mode]] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.p_gossip <= 1:
            raise ValueError(f"p_gossip={self.p_gossip} must be in [0, 1]; use 0.2")
        object.__setattr__(self, "windows", tuple(tuple(window) for window in self.windows))
        for window in self.windows:
            if len(window) != 3 or not 0 <= window[0] < window[1] or window[2] not in _MODES:
                raise ValueError(
                    f"windows: {list(window)} must be [first, last + 1, mode] with 0 <= first < last + 1 and a mode "
                    f"of {', '.join(_MODES)}, for example [900, 1000, 'gossip']"
                )

    def mode(self, round_number: int) -> Mode | None:
        """The rule of the window that holds this round; None: coins decide."""
        for first, end, mode in self.windows:
            if first <= round_number < end:
                return mode
        return None

    def neighbours(self, mixing: Mixing, rank: int, round_number: int, step: int) -> Neighbours:
        """``rank``'s part in gossip step ``step`` of the mixing, which belongs to a round, after the coins: the
        share of a message that is not sent stays with who would have had it."""
        plan = mixing.neighbours(rank, step)
        mode = self.mode(round_number)
        if mode == "gossip":
            return plan
        if mode is not None:
            return Neighbours({}, {}, 1.0)
        receives = {p: w for p, w in plan.receives.items() if self._meet(mixing, rank, p, step)}
        sends = {p: w for p, w in plan.sends.items() if self._meet(mixing, rank, p, step)}
        kept = sum(plan.receives.values()) - sum(receives.values())
        return Neighbours(sends, receives, plan.self_weight + kept)

    def _meet(self, mixing: Mixing, rank: int, peer: int, step: int) -> bool:
        pair = (min(rank, peer), max(rank, peer)) if mixing.symmetric else ()
        return uniform(self.seed, _COIN, step, *pair) < self.p_gossip

"""How many directions a pseudo-gradient is worth, and how long a round must be to hide them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AdaptiveRank:
    """The rule by which DiLoCoX's rank and round length follow the numerical rank of what was reduced, which
    falls during training. The paper has the idea; this rule is the library's own.

    With r' the smallest rank that holds ``energy`` of an outcome, over all matrices together::

        rank <- ceil(margin * mean of the last r'), at least min_rank and at most the first rank
        H    <- ceil(first H * rank / first rank), at least min_sync_every

    so that a transfer still hides in its round. All of it follows from reduced values: it is the same on every
    rank without any communication.

    Args:
        energy: share of the squared singular values to keep. Higher is more faithful and sends more.
        window: outcomes that r' is averaged over; the first rank holds until there are so many.
        margin: head room, above 1, so that a rank that became too low can be seen to be.
        min_rank: never below.
        min_sync_every: rounds are never shorter. Short rounds pay the latency of four exchanges more often.
        probe_every: every so many rounds the rank is raised by ``probe`` for one, to look for energy that the
            current one cannot see; 0 never does.
        probe: factor of the rank then.

    Raises:
        ValueError: a value out of range.
    """

    energy: float = 0.95
    window: int = 5
    margin: float = 1.25
    min_rank: int = 1
    min_sync_every: int = 1
    probe_every: int = 20
    probe: float = 1.25

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy={self.energy} must be in (0, 1]; use 0.95")
        for name, lowest in (
            ("window", 1),
            ("margin", 1),
            ("min_rank", 1),
            ("min_sync_every", 1),
            ("probe_every", 0),
            ("probe", 1),
        ):
            if not getattr(self, name) >= lowest:
                default = type(self).__dataclass_fields__[name].default
                raise ValueError(f"{name}={getattr(self, name)} must be >= {lowest}; use {default}")


class RankSchedule:
    """Where the rule of :class:`AdaptiveRank` stands.

    Args:
        rule: its settings.
        rank: the first and highest.
        sync_every: the first and highest number of inner steps per round.

    Raises:
        ValueError: ``rule`` asks for more than the first rank or round length.
    """

    def __init__(self, rule: AdaptiveRank, rank: int, sync_every: int) -> None:
        for name, least, first in (
            ("rank", rule.min_rank, rank),
            ("sync_every", rule.min_sync_every, sync_every),
        ):
            if least > first:
                raise ValueError(
                    f"min_{name}={least} is above {name}={first}, from which it only falls; lower it"
                )
        self.rule = rule
        self._first_rank, self._first_sync_every = rank, sync_every
        self._seen: deque[int] = deque(maxlen=rule.window)

    def observe(self, energies: Mapping[str, Tensor]) -> None:
        """Take in an outcome: by matrix, squared singular values in falling order. Without any energy it tells
        nothing."""
        found = numerical_rank(energies, self.rule.energy)
        if found:
            self._seen.append(found)

    def plan(self, round_number: int) -> tuple[int, int]:
        """(rank of the transfer of this round, inner steps of the round that hides it)."""
        rule, rank = self.rule, self._first_rank
        if len(self._seen) == rule.window:
            mean = sum(self._seen) / rule.window
            rank = min(max(math.ceil(mean * rule.margin), rule.min_rank), rank)
        if rule.probe_every and round_number and round_number % rule.probe_every == 0:
            rank = min(math.ceil(rank * rule.probe), self._first_rank)
        steps = math.ceil(self._first_sync_every * rank / self._first_rank)
        return rank, max(steps, rule.min_sync_every)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen = deque(state["seen"], maxlen=self.rule.window)


def numerical_rank(energies: Mapping[str, Tensor], share: float) -> int:
    """The smallest rank, the same for all matrices, that keeps ``share`` of their energy; 0 if there is none.

    Args:
        energies: by matrix, (r,) squared singular values in falling order; r may differ.
        share: in (0, 1].
    """
    longest = max((e.numel() for e in energies.values()), default=0)
    total = torch.zeros(longest, dtype=torch.float64)
    for e in energies.values():
        total[: e.numel()] += e.to(total)
    kept = total.cumsum(0)
    if not longest or not kept[-1] > 0:
        return 0
    return int((kept < share * kept[-1]).sum()) + 1

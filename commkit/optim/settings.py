"""What the settings of optimizers that communicate have in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..registry import did_you_mean


def require_known(group: Mapping[str, Any], known: Collection[str], owner: str) -> None:
    """torch keeps whatever a parameter group says, also what nobody reads.

    Raises:
        ValueError: the group sets something that cannot differ between groups, or that is unknown.
    """
    for name in group:
        if name not in known and name not in ("params", "param_names", "initial_lr"):
            hint = did_you_mean(name, [*known])
            raise ValueError(
                f"a parameter group sets {name!r}, which {owner} does not read per group{hint}; known: "
                f"{', '.join(known)}; give others to {owner} itself"
            )


def check_group(group: Mapping[str, Any], defaults: Mapping[str, float], owner: str) -> None:
    """A parameter group of an optimizer whose ``defaults`` are what may differ between groups.

    Raises:
        ValueError: it sets anything else, or a negative number.
    """
    require_known(group, defaults, owner)
    require_at_least_zero({name: group.get(name, value) for name, value in defaults.items()})


def without_own(group: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """``group`` without settings that are equal to ``own``, the optimizer's: ZeroRedundancyOptimizer puts all that it was
    given into its groups."""
    return {name: value for name, value in group.items() if name not in own or value != own[name]}


def require_at_least_zero(settings: Mapping[str, float]) -> None:
    """
    Raises:
        ValueError: one of them is negative or not a number.
    """
    for name, value in settings.items():
        if not value >= 0:
            raise ValueError(f"{name}={value} must be >= 0")

"""Which code to take: the configurations that YAML names, ``code: cyclic_mds``.

A family knows no number of workers; its :meth:`~CodeFamily.build` makes the code for those at hand.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass

from ..registry import lookup, register
from .codes import (
    ConditioningWarning,
    CyclicMDS,
    CyclicRandom,
    FractionalRepetition,
    GradientCode,
    check_stragglers,
)


class CodeFamily(ABC):
    """A frozen dataclass that is its own configuration."""

    @abstractmethod
    def build(self, num_workers: int, num_stragglers: int) -> GradientCode:
        """The code for these workers.

        Raises:
            ValueError: there is none; the message says what would do.
        """


@register("code", "auto")
@dataclass(frozen=True)
class AutoFamily(CodeFamily):
    """Fractional repetition where s + 1 divides n, else cyclic MDS where n - s is odd, else the best of 200
    random cyclic codes.

    Args:
        seed: of the random code.
    """

    seed: int = 0

    def build(self, num_workers: int, num_stragglers: int) -> GradientCode:
        check_stragglers(num_workers, num_stragglers)
        if num_workers % (num_stragglers + 1) == 0:
            return FractionalRepetition(num_workers, num_stragglers)
        if (num_workers - num_stragglers) % 2:
            return CyclicMDS(num_workers, num_stragglers)
        return CyclicRandom(num_workers, num_stragglers, self.seed)


@register("code", "fractional_repetition")
@dataclass(frozen=True)
class FractionalRepetitionFamily(CodeFamily):
    """See :class:`~commkit.straggler.FractionalRepetition`."""

    def build(self, num_workers: int, num_stragglers: int) -> GradientCode:
        return FractionalRepetition(num_workers, num_stragglers)


@register("code", "cyclic_mds")
@dataclass(frozen=True)
class CyclicMDSFamily(CodeFamily):
    """See :class:`~commkit.straggler.CyclicMDS`."""

    def build(self, num_workers: int, num_stragglers: int) -> GradientCode:
        return CyclicMDS(num_workers, num_stragglers)


@register("code", "cyclic_random")
@dataclass(frozen=True)
class CyclicRandomFamily(CodeFamily):
    """See :class:`~commkit.straggler.CyclicRandom`.

    Args:
        seed: of the draws.
        draws: how many to choose from.
    """

    seed: int = 0
    draws: int = 200

    def build(self, num_workers: int, num_stragglers: int) -> GradientCode:
        return CyclicRandom(num_workers, num_stragglers, self.seed, self.draws)


def make_code(
    num_workers: int, num_stragglers: int, kind: str | CodeFamily = "auto"
) -> GradientCode:
    """A gradient code for ``num_workers``, of which any ``num_stragglers`` may be missing.

    Args:
        kind: a family, or its name with default settings.

    Raises:
        UnknownNameError: no family has that name.
        ValueError: the family has no code for these numbers.
    """
    family = lookup("code", kind)() if isinstance(kind, str) else kind
    built: GradientCode = family.build(num_workers, num_stragglers)
    return built


def is_usable(num_workers: int, num_stragglers: int) -> bool:
    """Whether "auto" has a code whose sums float32 can carry. Cheap enough to ask of many numbers."""
    if not 0 <= num_stragglers < num_workers:
        return False
    if num_workers % (num_stragglers + 1) == 0:
        return True
    if (num_workers - num_stragglers) % 2 == 0:
        return False  # a random code: seldom, and it takes seconds to find out
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConditioningWarning)
        try:
            CyclicMDS(num_workers, num_stragglers)
        except (ConditioningWarning, ValueError):
            return False
    return True

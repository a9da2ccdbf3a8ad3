"""What recipes have in common whose ranks have roles: a coordinator and its workers, a server and its trainers."""

from typing import TypeVar

from commkit.schemes import make_scheme
from launch import baselines
from launch.settings import TrainSettings

S = TypeVar("S")


def scheme_of(settings: TrainSettings, kind: type[S]) -> S | None:
    """The recipe's scheme if it is of this kind.

    Raises:
        ConfigError: unknown scheme or field, or a value out of range.
    """
    if baselines.is_baseline(settings.scheme):
        return None
    made = make_scheme(settings.scheme)
    return made if isinstance(made, kind) else None

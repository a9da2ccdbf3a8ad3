"""The DeepSpeed that is installed, and what of it this package relies on.

Where gradients are reduced is nobody's public interface, so the version is checked, and so is every method that is
replaced: another signature is refused, not guessed.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

SUPPORTED = ((0, 19), (0, 20))
_PACKAGE = "deepspeed>=0.19,<0.20"


class DeepSpeedVersionError(RuntimeError):
    """The installed DeepSpeed is not one that commkit knows the inside of."""


def require_deepspeed() -> Any:
    """The package ``deepspeed``.

    Raises:
        ModuleNotFoundError: it is not installed.
        DeepSpeedVersionError: not a version this was written for.
    """
    try:
        package = importlib.import_module("deepspeed")
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise ModuleNotFoundError(
            "commkit.deepspeed needs the package deepspeed; pip install 'commkit[deepspeed]'"
        ) from None
    require_version(str(package.__version__))
    return package


def require_version(version: str) -> None:
    """
    Raises:
        DeepSpeedVersionError: outside of ``SUPPORTED``.
    """
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    low, high = SUPPORTED
    if not low <= numbers < high:
        raise DeepSpeedVersionError(
            f"deepspeed {version} is installed, and commkit replaces methods that are private to "
            f"0.19; pip install '{_PACKAGE}'"
        )


def require_method(owner: Any, name: str, parameters: tuple[str, ...]) -> Any:
    """The method ``name`` of ``owner``, which takes ``parameters``.

    Raises:
        DeepSpeedVersionError: there is none, or it takes others.
    """
    method = getattr(owner, name, None)
    found = None if method is None else _parameters(method)
    if found != parameters:
        what = "is missing" if found is None else f"takes {found}"
        raise DeepSpeedVersionError(
            f"{type(owner).__name__}.{name} {what} and was expected to take {parameters}; "
            f"pip install '{_PACKAGE}', or tell commkit's authors about this version"
        )
    return method


def _parameters(method: Any) -> tuple[str, ...]:
    """Without ``self``. DeepSpeed's decorator for profiling hides them in a closure."""
    hidden = inspect.getclosurevars(inspect.unwrap(getattr(method, "__func__", method)))
    inside = hidden.nonlocals.get("func")
    if inside is not None:
        return tuple(inspect.signature(inside).parameters)[1:]
    return tuple(inspect.signature(method).parameters)

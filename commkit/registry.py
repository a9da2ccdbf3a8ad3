"""Names for parts and schemes: what ``name: ...`` in a YAML file refers to.

A part registers itself with one decorator in its own file; nothing else is edited to add one.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar

Kind: TypeAlias = Literal[
    "compressor", "feedback", "aggregator", "scheme", "topology", "push_rule", "code"
]
Factory: TypeAlias = Callable[..., Any]
T = TypeVar("T", bound=Factory)

_factories: dict[Kind, dict[str, Factory]] = {
    "compressor": {},
    "feedback": {},
    "aggregator": {},
    "scheme": {},
    "topology": {},
    "push_rule": {},
    "code": {},
}


class UnknownNameError(ValueError):
    """No part of that kind has that name."""


def register(kind: Kind, name: str) -> Callable[[T], T]:
    """Class or function decorator: make the decorated factory known as ``name``.

    Raises:
        ValueError: the name is taken.
    """

    def add(factory: T) -> T:
        if name in _factories[kind]:
            raise ValueError(f"{kind} {name!r} is registered twice; give one of them another name")
        _factories[kind][name] = factory
        return factory

    return add


def lookup(kind: Kind, name: str) -> Factory:
    """The factory registered as ``name``.

    Raises:
        UnknownNameError: it names the nearest known name and lists them all.
    """
    known = _factories[kind]
    if name not in known:
        hint = did_you_mean(name, list(known))
        raise UnknownNameError(f"unknown {kind} {name!r}{hint}; known: {', '.join(sorted(known))}")
    return known[name]


def names(kind: Kind) -> list[str]:
    return sorted(_factories[kind])


def did_you_mean(word: str, known: list[str]) -> str:
    """``", did you mean 'x'?"`` or the empty string."""
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def import_all(package: str, path: list[str]) -> None:
    """Import every module of a package, so that what lives there registers itself."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def spec(part: Any) -> Any:
    """A part's configuration as plain data: what a YAML block that builds it would say."""
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = {
            f.name: spec(getattr(part, f.name))
            for f in dataclasses.fields(part)
            if f.init and f.repr
        }
        name = next(
            (n for known in _factories.values() for n, f in known.items() if f is type(part)), None
        )
        return {"name": name, **fields} if name else fields
    if isinstance(part, tuple):
        return [spec(item) for item in part]
    return part if isinstance(part, str | int | float | bool | None) else str(part)

"""Cutting a model into fragments that are synchronised one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from torch import nn

from .blocks import ancestors, blocks, join
from .replica import Replica
from .units import Unit

Pattern: TypeAlias = Literal["sequential", "strided"]
Fragments: TypeAlias = int | Sequence[Sequence[str]]
"""A number of fragments, or for each the names of its modules (``"transformer.h.0"``) or parameters."""

_NAMED_AT_MOST = 3


def cut(replica: Replica, fragments: Fragments, pattern: Pattern = "strided") -> list[Unit]:
    """Units that hold every trainable parameter and every buffer exactly once.

    Shared weights go with the module that comes first; buffers with their module. What comes before the
    first layer (embeddings) is in the first fragment, what comes after the last (norm, head) in the last,
    what lies between layers with the one before it.

    Args:
        replica: the model.
        fragments: F >= 1, at most the number of layers; or a list of lists of names.
        pattern: layer l of L goes to fragment ``l mod F`` ("strided"), or layers stay together in runs of
            about L/F ("sequential"). No matter for a list.

    Raises:
        ValueError: F below 1 or above the number of layers, an unknown pattern, or a list that names something
            unknown, something twice, or not everything.
    """
    if pattern not in ("sequential", "strided"):
        raise ValueError(f"pattern={pattern!r} must be 'sequential' or 'strided'")
    if isinstance(fragments, int):
        count, place_of = fragments, _by_layer(replica, fragments, pattern)
    else:
        count, place_of = len(fragments), _by_name(replica, fragments)
    parameters: list[list[str]] = [[] for _ in range(count)]
    buffers: list[list[str]] = [[] for _ in range(count)]
    for name in replica.parameters:
        parameters[place_of[name]].append(name)
    for name in replica.buffers:
        buffers[place_of[name]].append(name)
    for index, names in enumerate(parameters):
        if not names:
            raise ValueError(
                f"fragment {index} holds no trainable parameter (of its own: shared ones go with the module "
                "that comes first); leave it out"
            )
    return [
        Unit(index, tuple(names), tuple(of_buffers))
        for index, (names, of_buffers) in enumerate(zip(parameters, buffers, strict=True))
    ]


def require_divides(sync_every: int, fragments: int) -> None:
    """
    Raises:
        ValueError: F does not divide H, with the nearest values of both that fit.
    """
    if sync_every % fragments == 0:
        return
    below = sync_every - sync_every % fragments
    steps = [h for h in (below, below + fragments) if h]
    divisors = [f for f in range(1, sync_every + 1) if sync_every % f == 0]
    counts = [
        *(f for f in divisors[::-1] if f < fragments),
        *(f for f in divisors if f > fragments),
    ]
    nearest = sorted(sorted(counts, key=lambda f: abs(f - fragments))[:2])
    raise ValueError(
        f"fragments={fragments} must divide sync_every={sync_every}, as one starts every sync_every/fragments "
        f"steps; the nearest that work: sync_every={_either(steps)}, or fragments={_either(nearest)}"
    )


def _by_layer(replica: Replica, fragments: int, pattern: Pattern) -> dict[str, int]:
    names = blocks(replica.model)
    count = len(names)
    if not 1 <= fragments <= count:
        raise ValueError(
            f"fragments={fragments} must be at least 1 and at most the model's number of layers, {count} "
            f"({_some(names)}); use at most {count}, or name the modules of each fragment"
        )
    number = {name: index for index, name in enumerate(names)}
    places: dict[str, int] = {}
    before = -1  # the last layer that began before where we are
    for name, module in replica.model.named_modules():
        layer = next((number[n] for n in ancestors(name) if n in number), None)
        before = before if layer is None else max(before, layer)
        if layer is None and before < 0:
            place = 0
        elif layer is None and before == count - 1:
            place = fragments - 1
        else:
            place = _fragment(before if layer is None else layer, count, fragments, pattern)
        places.update(dict.fromkeys(_tensors(name, module), place))
    return places


def _fragment(layer: int, count: int, fragments: int, pattern: Pattern) -> int:
    return layer % fragments if pattern == "strided" else layer * fragments // count


def _by_name(replica: Replica, fragments: Sequence[Sequence[str]]) -> dict[str, int]:
    listed: dict[str, int] = {}
    for index, names in enumerate(fragments):
        for name in [names] if isinstance(names, str) else names:
            if name in listed:
                raise ValueError(
                    f"fragments name {name!r} twice, in {listed[name]} and {index}; name it once"
                )
            listed[name] = index
    aliases = _aliases(replica.model)
    known = {part for alias in aliases for part in ancestors(alias)}
    unknown = [name for name in listed if name not in known]
    if unknown:
        raise ValueError(
            f"fragments name {_some(unknown)}, which is no module or parameter of the model; see "
            "model.named_modules()"
        )
    places: dict[str, int] = {}
    for alias, name in aliases.items():
        found = {listed[part] for part in ancestors(alias) if part in listed}
        if len(found) > 1:
            raise ValueError(
                f"fragments {sorted(found)} all hold {alias!r}; name a module or its parts, not both"
            )
        if found:
            places.setdefault(name, found.pop())
    missing = [name for name in (*replica.parameters, *replica.buffers) if name not in places]
    if missing:
        raise ValueError(f"fragments leave out {_some(missing)}; put every module into one")
    return places


def _aliases(model: nn.Module) -> dict[str, str]:
    """All names of each parameter and buffer -> the one that the library uses, in the model's order."""
    first: dict[int, str] = {}
    aliases = {}
    for kind in (model.named_parameters, model.named_buffers):
        for name, tensor in kind(remove_duplicate=False):
            aliases[name] = first.setdefault(id(tensor), name)
    return aliases


def _tensors(name: str, module: nn.Module) -> list[str]:
    own: Mapping[str, object] = {
        **dict(module.named_parameters(recurse=False)),
        **dict(module.named_buffers(recurse=False)),
    }
    return [join(name, key) for key in own]


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _either(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))

"""The layers of a model, in forward order, and what has to be up to date before each of its modules runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.distributed.fsdp import FSDPModule

from .blocks import ancestors, blocks
from .replica import Replica
from .units import Unit


@dataclass(frozen=True)
class Layers:
    """
    Args:
        units: every trainable parameter and every buffer in one of them, in forward order.
        needs: by module, the index of the last unit that it computes with itself, or as a layer.
    """

    units: list[Unit]
    needs: dict[nn.Module, int]


def layers_of(replica: Replica, names: Sequence[str] | None = None) -> Layers:
    """Cut ``replica`` into layers.

    Layers are the modules that FSDP2's ``fully_shard`` was called on, each with what no inner one holds, since
    that is what is gathered together; in other models those that
    :func:`~commkit.outer.blocks.blocks` finds. What comes before, between and after them
    makes further units. Forward order is taken to be that of ``model.named_modules()``; where it is not,
    the result is the same and less is hidden. Shared weights go with the module that comes first.

    Args:
        replica: the model.
        names: modules that are layers, in place of those found.

    Raises:
        ValueError: a name that is no module of the model, or names where FSDP2 has cut the model.
    """
    modules = dict(replica.model.named_modules())
    sharded = [name for name, module in modules.items() if isinstance(module, FSDPModule)]
    if names is not None and sharded:
        raise ValueError(
            f"layers={list(names)} of a model whose layers are what fully_shard was called on; leave it out"
        )
    unknown = [name for name in names or () if name not in modules]
    if unknown:
        raise ValueError(f"layers name {unknown[0]!r}, which is not in model.named_modules()")
    heads = set(sharded or (blocks(replica.model) if names is None else names))

    place_of: dict[str, int] = {}  # by module name
    places: dict[str | int, int] = {}
    entered: set[str] = set()
    for name in modules:
        head = next((part for part in ancestors(name) if part in heads), None)
        if head is not None:
            entered.add(head)
        # Outside of layers, what lies between the same two layers goes together.
        place_of[name] = places.setdefault(len(entered) if head is None else head, len(places))

    parameters: dict[int, list[str]] = {}
    for name in replica.parameters:
        parameters.setdefault(place_of[_parent(name)], []).append(name)
    index_of = {place: index for index, place in enumerate(sorted(parameters))}
    buffers: dict[int, list[str]] = {}
    for name in replica.buffers:
        place = place_of[_parent(name)]
        # Frozen layers may still keep statistics: these go with the last unit before them.
        index = max((i for p, i in index_of.items() if p <= place), default=0)
        buffers.setdefault(index, []).append(name)
    units = [
        Unit(index, tuple(parameters[place]), tuple(buffers.get(index, ())))
        for place, index in index_of.items()
    ]

    unit_of = {id(replica.parameters[n]): unit.index for unit in units for n in unit.parameters}
    needs: dict[nn.Module, int] = {}
    for name, module in modules.items():
        needed = [unit_of[id(p)] for p in _own(module) if id(p) in unit_of]
        if name in heads and place_of[name] in index_of:
            needed.append(index_of[place_of[name]])
        if needed:
            needs[module] = max(needed)
    return Layers(units, needs)


def run_before(
    module: nn.Module, whole: bool, index: int, last: int, write: Callable[[int], None]
) -> None:
    """Write weights before ``module`` computes with them, whoever has gathered them.

    Args:
        module: about to run.
        whole: whether it is the model itself.
        index: of the last unit that it needs.
        last: in its place where FSDP2 gathers ahead.
        write: brings all units up to an index up to date.
    """
    if not isinstance(module, FSDPModule):
        write(index)
        return
    module.reshard()  # what an evaluation left gathered is about to change
    write(last if _gathers_ahead(module) else index)
    if not whole:
        # FSDP's own streams wait for writes of before the forward pass; asynchronous gathers use this one.
        handle = module.unshard(async_op=True)
        if handle is not None:
            handle.wait()


def _gathers_ahead(module: FSDPModule) -> bool:
    """Whether FSDP gathers other modules when it comes to ``module``. It has no public word for it; only looked
    at, never touched."""
    return bool(module._get_fsdp_state()._states_to_forward_prefetch)


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    """What ``module`` computes with when it is called: lists of parameters are not called themselves."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if isinstance(child, nn.ParameterList | nn.ParameterDict):
            yield from _own(child)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]

"""The layers that a model repeats, by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn


def blocks(model: nn.Module) -> list[str]:
    """Names of the model's layers, in its order: the children of its outermost ModuleLists or Sequentials,
    whichever hold more weights; without either, its modules with weights of their own. Lists with a
    single child, and children with nothing to train, do not count."""
    own = [name for name, p in model.named_parameters() if p.requires_grad]  # shared ones once
    found = [list(_outermost(model, kind, "", own)) for kind in (nn.ModuleList, nn.Sequential)]
    stacks = max(found, key=lambda stacks: sum(_trainable(stack) for _, stack in stacks))
    if stacks:
        return [child for name, stack in stacks for child in _children(name, stack, own)]
    leaves: list[str] = []
    for name in dict.fromkeys(parameter.rpartition(".")[0] for parameter in own):
        if name and not any(_inside(name, leaf) for leaf in leaves):
            leaves.append(name)
    return leaves or [""]


def ancestors(name: str) -> list[str]:
    """``a.b.c``, ``a.b``, ``a`` and the root."""
    parts = name.split(".") if name else []
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _outermost(
    module: nn.Module, kind: type[nn.Module], name: str, own: Sequence[str]
) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, kind) and len(_children(name, module, own)) > 1:
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _outermost(child, kind, join(name, child_name), own)


def _children(name: str, module: nn.Module, own: Sequence[str]) -> list[str]:
    """Those with something to train that is not a part of an earlier module."""
    children = [join(name, child_name) for child_name, _ in module.named_children()]
    return [child for child in children if any(_inside(parameter, child) for parameter in own)]


def _trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")

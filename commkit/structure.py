"""Any nested state as plain tensors plus a JSON skeleton: nothing in a checkpoint is pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .types import StateDict

_SKELETON = "skeleton"


def flatten(state: Any) -> StateDict:
    """The tensors of ``state`` by path, and ``skeleton``, a uint8 tensor of JSON that says where they go.

    ``state`` is made of dicts (str or int keys), lists, tuples, tensors, numbers, strings and None.

    Raises:
        TypeError: anything else, with its path.
    """
    tensors: StateDict = {}
    skeleton = _encode(state, "", tensors)
    text = json.dumps(skeleton).encode()
    return tensors | {_SKELETON: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def unflatten(tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of :func:`flatten`."""
    text = bytes(tensors[_SKELETON].tolist()).decode()
    return _decode(json.loads(text), tensors)


def _encode(value: Any, path: str, tensors: StateDict) -> Any:
    if isinstance(value, Tensor):
        tensors[f"tensor{path}"] = value.detach()
        return {"tensor": f"tensor{path}"}
    if isinstance(value, Mapping):
        # Pairs, because JSON turns integer keys into text.
        return {"dict": [[k, _encode(v, f"{path}.{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(v, f"{path}.{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"state{path} is a {type(value).__name__}, which a checkpoint cannot hold; make it a tensor, a "
        "number, text, or a dict or list of those"
    )


def _decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)

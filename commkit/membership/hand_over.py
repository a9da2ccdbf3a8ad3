"""The training state, from a worker that has it to those that have not."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..types import Comm, Stateful

_TAG = 1
_SIZE_TAG = 2


def state_of(items: Mapping[str, Stateful]) -> dict[str, Any]:
    """What is equal on all workers, by the name of each item."""
    return {
        name: getattr(item, "shared_state_dict", item.state_dict)() for name, item in items.items()
    }


def send(items: Mapping[str, Stateful], comm: Comm, ranks: Sequence[int]) -> None:
    """Send the state of ``items`` to ``ranks``."""
    buffer = io.BytesIO()
    torch.save(state_of(items), buffer)
    data = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    size = torch.tensor([data.numel()])
    comm.exchange(dict.fromkeys(ranks, size), {}, _SIZE_TAG)
    comm.exchange(dict.fromkeys(ranks, data), {}, _TAG)


def receive(items: Mapping[str, Stateful], comm: Comm, rank: int) -> bool:
    """Load the state of ``items`` that ``rank`` sends. False: it was lost on the way, and nothing is changed."""
    size = torch.zeros(1, dtype=torch.int64)
    if comm.exchange({}, {rank: size}, _SIZE_TAG):
        return False
    data = torch.empty(int(size), dtype=torch.uint8)
    if comm.exchange({}, {rank: data}, _TAG):
        return False
    states = torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)
    for name, item in items.items():
        item.load_state_dict(states[name])
    return True

"""Runs of hierarchical reducers on threads, and what is left unsent in them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from commkit.reducer import Reducer
from commkit.schemes import hierarchical, make_reducer
from commkit.sim import ThreadComm, run_threads
from commkit.types import ByteCounter, StateDict

Tensors = dict[str, torch.Tensor]

SHAPES: dict[str, tuple[int, ...]] = {
    "first": (40, 36),
    "third": (24, 50),
    "conv": (8, 4, 3, 3),
    "vector": (700,),
    "scalar": (),
    "empty": (0,),
    "last": (30, 30),
}

SCHEMES: dict[str, dict[str, Any]] = {
    "powersgd": {"name": "powersgd", "rank": 2, "min_compression_rate": 0.0},
    "alternating": {"name": "powersgd", "rank": 2, "iteration": "alternating"},
    "int8": {"name": "int8", "min_numel": 0},
    "sign": {"name": "sign", "min_numel": 0},
    "topk": {"name": "topk", "density": 0.1, "min_numel": 0},
    "randomk": {"name": "randomk", "density": 0.1, "min_numel": 0},
}


def gradients(rank: int, step: int, dtype: torch.dtype = torch.float64) -> Tensors:
    """One rank's gradients: a part that all ranks and steps share, and noise."""

    def sample(*at: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(repr(at).encode()))
        return torch.randn(SHAPES[at[0]], generator=generator, dtype=torch.float64)

    return {key: (0.5 * sample(key) + sample(key, rank, step)).to(dtype) for key in SHAPES}


def node_mean(grads: Sequence[Tensors]) -> Tensors:
    """Added up in rank order, divided first."""
    means = {key: x / len(grads) for key, x in grads[0].items()}
    for other in grads[1:]:
        for key, x in other.items():
            means[key] = means[key].add(x, alpha=1 / len(grads))
    return means


@dataclass
class Run:
    """What one rank saw."""

    outs: list[Tensors] = field(default_factory=list)
    state: StateDict = field(default_factory=dict)
    bytes: ByteCounter = field(default_factory=ByteCounter)


def run(
    make: Callable[[], Reducer],
    world_size: int,
    steps: range,
    grads: Callable[[int, int], Tensors],
    states: Sequence[Mapping[str, torch.Tensor]] = (),
) -> list[Run]:
    """Reduce ``grads(rank, step)`` on every rank, from ``states[rank]`` if given."""

    def body(comm: ThreadComm) -> Run:
        reducer, seen = make(), Run()
        if states:
            reducer.load_state_dict(states[comm.rank])
        for step in steps:
            outs = reducer.reduce(grads(comm.rank, step), comm)
            seen.outs.append({key: x.clone() for key, x in outs.items()})
            reducer.end_step()
        seen.state = {key: x.clone() for key, x in reducer.state_dict().items()}
        seen.bytes = comm.bytes
        return seen

    return run_threads(body, world_size)


def between(scheme: str, local_size: int | None) -> Callable[[], Reducer]:
    """A maker of reducers with the scheme between nodes."""
    return lambda: hierarchical(make_reducer(SCHEMES[scheme]), local_size)


def unsent(states: Sequence[StateDict], key: str) -> torch.Tensor:
    """What the mean gradient has not got yet: the nodes' residuals on average, servers' residuals, and
    state that all ranks have loaded and nobody has taken yet."""
    left = torch.zeros(torch.Size(SHAPES[key]).numel(), dtype=torch.float64)
    of_nodes = [s[f"aggregator/node/{key}"] for s in states if f"aggregator/node/{key}" in s]
    for residual in of_nodes:
        left += residual.reshape(-1) / len(of_nodes)
    waiting = f"aggregator/whole/{key}", f"aggregator/aggregator/whole/{key}"
    for name in waiting:
        for state in [s for s in states if name in s][:1]:
            left += state[name].reshape(-1)
    for state in states:
        for name, residual in state.items():
            if name.startswith(f"aggregator/aggregator/shard/{key}@"):
                start = int(name.rpartition("@")[2])
                left[start : start + residual.numel()] += residual
    return left.view(SHAPES[key])

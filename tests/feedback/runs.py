"""A scheme on several ranks, watched step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from commkit.aggregators import AllGather
from commkit.compressors import TopK
from commkit.policy import Policy
from commkit.reducer import Reducer
from commkit.sim import ThreadComm, run_threads
from commkit.types import Feedback

Grads = Callable[[int, int], torch.Tensor]
N = 200


def gradient(rank: int, step: int) -> torch.Tensor:
    """Float64 of size 1; ranks and steps have something in common."""
    parts = [
        torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1 + rank, 1000 + 10 * step + rank)
    ]
    return sum(parts[1:], parts[0])


def constant(rank: int, step: int) -> torch.Tensor:
    return gradient(rank, 0)


def reducer(feedback: Feedback, density: float = 0.1, **policy: int) -> Reducer:
    return Reducer(AllGather(TopK(density)), feedback, Policy(**{"min_numel": 0, **policy}))


def run(
    make: Callable[[], Reducer], world_size: int, steps: int, grads: Grads = gradient
) -> list[list[tuple[torch.Tensor, dict[str, torch.Tensor]]]]:
    """Per rank and step: (result, state of the parameter "w")."""

    def body(comm: ThreadComm) -> Any:
        at_work, seen = make(), []
        for step in range(steps):
            out = at_work.reduce({"w": grads(comm.rank, step)}, comm)["w"].clone()
            at_work.end_step()
            state = {k: x.clone() for k, x in at_work.state_dict().items() if k != "shared/step"}
            seen.append((out, state))
        return seen

    return run_threads(body, world_size)

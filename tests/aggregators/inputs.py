"""Tensors and contexts to aggregate, and a way to run an aggregator on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from commkit.sim import ThreadComm, run_threads
from commkit.types import Aggregated, Aggregator, TensorCtx

Shape = tuple[int, ...]


def sample(shape: Shape, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def ctx_of(key: str, x: torch.Tensor, step: int = 0, seed: int = 0) -> TensorCtx:
    return TensorCtx(key, x.shape, x.dtype, x.device, step, seed)


def contexts(xs: Sequence[torch.Tensor], step: int = 0) -> list[TensorCtx]:
    """Contexts of tensors named "0", "1" and so on."""
    return [ctx_of(str(i), x, step) for i, x in enumerate(xs)]


def aggregate(
    make: Callable[[], Aggregator], ranks: Sequence[Sequence[torch.Tensor]], step: int = 0
) -> list[list[Aggregated]]:
    """One round of a new aggregator on every rank; ``ranks[r]`` are rank r's tensors."""

    def body(comm: ThreadComm) -> list[Aggregated]:
        aggregator, xs = make(), ranks[comm.rank]
        outcomes = aggregator.aggregate(xs, contexts(xs, step), comm)
        for outcome in outcomes:
            assert outcome.sent.shape == outcome.mean.shape
        aggregator.commit(True)
        return outcomes

    return run_threads(body, len(ranks))

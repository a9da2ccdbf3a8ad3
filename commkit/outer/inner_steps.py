"""The inner optimizer's steps: when gradients are there, and their average while replicas train as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..reducer import all_reduce_dense
from ..runtime.shards import local
from ..types import Comm
from .replica import Replica


def when_ready(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    evaluate: Callable[[Callable[[], Any]], Any],
    first: Callable[[], None],
    again: Callable[[], None],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Call ``first`` once the gradients of an optimizer step are there: at once, or, if the optimizer is given a closure,
    when that has run.

    Args:
        args: what a pre-hook of ``Optimizer.step`` is given: the optimizer, perhaps a closure.
        kwargs: the same.
        evaluate: runs the closure and returns its loss.
        first: called once per step.
        again: called each further time that the optimizer evaluates the closure in a step, as LBFGS does.

    Returns:
        Arguments for the optimizer in place of its own, as the hook returns them; None if they stay.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        first()
        return None
    calls = 0

    def ready() -> Any:
        nonlocal calls
        loss = evaluate(closure)
        calls += 1
        (first if calls == 1 else again)()
        return loss

    return args[:1], {**kwargs, "closure": ready}


@torch.no_grad()
def average_gradients(
    replica: Replica,
    comm: Comm,
    on_worker: Callable[[Callable[[], None], Sequence[Tensor]], None],
) -> None:
    """Average the gradients over the ranks of ``comm``, densely, as DDP does; parameters without one count as 0.

    Args:
        replica: whose gradients.
        comm: used on the worker's thread alone.
        on_worker: runs a job there, which uses the given tensors, and waits for it.
    """
    gradients = {}
    for name, p in replica.parameters.items():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        gradients[name] = local(p.grad)

    def average() -> None:
        for name, mean in all_reduce_dense(gradients, comm).items():
            gradients[name].copy_(mean)

    on_worker(average, list(gradients.values()))

"""Ranks with a real DeepSpeed, on gloo. A class of tests shares its processes, since importing it takes seconds."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..adapters import problem
from ..harness import run_ranks

SILENT = {
    "steps_per_print": 10**9,
    "train_micro_batch_size_per_gpu": 16,
    "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
}


def prepare(rank: int, world_size: int) -> None:
    """This process's environment, and DeepSpeed without what it would compile at its first start."""
    variables = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1",
        "DEEPSPEED_LOG_LEVEL": "error",
    }
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    import deepspeed

    # Collectives through shared memory, in place of which gloo does as well. Compiling takes half a minute, and a
    # process that is killed meanwhile leaves a lock for which all later ones wait.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.logger.setLevel("ERROR")


def allow_fp16() -> None:
    """DeepSpeed refuses fp16 on CPUs that compute it slowly."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def config(stage: int = 0, **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {**SILENT, "zero_allow_untested_optimizer": True, **changes}
    if stage:
        made["zero_optimization"] = {"stage": stage, **made.get("zero_optimization", {})}
    return made


def engine_of(net: nn.Module, ds_config: Any, optimizer: Any = None, **arguments: Any) -> Any:
    import commkit.deepspeed

    engine, *_ = commkit.deepspeed.initialize(
        model=net,
        model_parameters=[p for p in net.parameters() if p.requires_grad],
        optimizer=optimizer,
        config=ds_config,
        **arguments,
    )
    return engine


def loss_of(engine: Any, step: int, rank: int, spoil: bool = False) -> torch.Tensor:
    dtype = next(engine.module.parameters()).dtype
    x, y = (t.to(dtype) for t in problem.batch(step, rank))
    if spoil:
        x = x * torch.inf
    return nn.functional.mse_loss(engine(x).float(), y.float())


def train(engine: Any, steps: range, rank: int, accumulate: int = 1) -> list[float]:
    losses = []
    for step in steps:
        for micro in range(accumulate):
            loss = loss_of(engine, step * accumulate + micro, rank)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def weights(engine: Any) -> torch.Tensor:
    """All of them, on every rank, also where they are in parts."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return problem.parameters(engine.module).clone()


class Failed(str):
    """The traceback of a case."""


def _each(
    rank: int, world_size: int, cases: Sequence[Callable[..., Any]], arguments: tuple[Any, ...]
) -> dict[str, Any]:
    prepare(rank, world_size)
    import deepspeed

    deepspeed.init_distributed("gloo")  # which pipeline modules ask before there is an engine
    outcomes: dict[str, Any] = {}
    for case in cases:
        dist.barrier()
        try:
            outcomes[case.__name__] = case(rank, *arguments)
        except Exception:
            outcomes[case.__name__] = Failed(traceback.format_exc())
    dist.barrier()
    return outcomes


class Outcomes:
    """Of cases that were run one after another on the same ranks."""

    def __init__(
        self, world_size: int, *cases: Callable[..., Any], arguments: tuple[Any, ...] = ()
    ) -> None:
        self._of_ranks = run_ranks(_each, world_size, cases, arguments, deadline_s=280.0)

    def of(self, case: Callable[..., Any]) -> list[Any]:
        """What ``case(rank, *arguments)`` returned, in rank order."""
        results = [outcomes[case.__name__] for outcomes in self._of_ranks]
        for rank, result in enumerate(results):
            assert not isinstance(result, Failed), f"rank {rank}:\n{result}"
        return results


def refusal(function: Callable[[], Any]) -> str:
    """The error of ``function``, which must raise one, with its type."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "was not refused"

"""One place per ZeRO stage where DeepSpeed averages gradients, and what happens there instead.

==== ================================================================== ====================================
0    ``engine.buffered_allreduce_fallback``                             all gradients, once a step
1, 2 ``optimizer.gradient_reduction_w_predivide``                       a flat bucket
3    ``optimizer._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads``    a bucket, of which each rank keeps its part
==== ================================================================== ====================================
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...runtime.agreement import trainable_parameters
from .handle import EngineHandle
from .library import require_method

_END = "independent_gradient_partition_epilogue"
_STAGE_12 = "gradient_reduction_w_predivide"
_STAGE_3 = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"


def check_methods(engine: Any) -> None:
    """
    Raises:
        DeepSpeedVersionError: a method that is to be replaced is not what it was.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        require_method(engine, "buffered_allreduce_fallback", ("grads", "elements_per_buffer"))
        return
    require_method(engine.optimizer, _END, ())
    if stage == 3:
        require_method(engine.optimizer, _STAGE_3, ("params_to_reduce", "communication_data_type"))
    else:
        require_method(engine.optimizer, _STAGE_12, ("tensor", "communication_data_type"))


def gradients_like(engine: Any) -> dict[str, Tensor]:
    """Tensors like the gradients to come, by parameter name; they take no memory."""
    like = {}
    for name, p in trainable_parameters(engine.module).items():
        shape = getattr(p, "ds_shape", p.shape)  # stage 3 leaves the parameter itself empty
        like[name] = p.detach().new_empty(()).expand(shape)
    return like


def put_in_place(engine: Any, handle: EngineHandle) -> None:
    """Reduce through ``handle`` from now on."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        _at_stage_0(engine, handle)
        return
    names = {p: name for name, p in trainable_parameters(engine.module).items()}
    if stage == 3:
        _at_stage_3(engine.optimizer, handle, names)
    else:
        _at_stage_1_or_2(engine.optimizer, handle, names)
    finish = getattr(engine.optimizer, _END)

    def end() -> None:
        finish()
        handle.end_pass()

    handle.replace(engine.optimizer, _END, end)


def _at_stage_0(engine: Any, handle: EngineHandle) -> None:
    parameters = trainable_parameters(engine.module)

    def reduce_all(grads: Any = None, elements_per_buffer: int = 0) -> None:
        if grads is not None:
            raise RuntimeError(
                "buffered_allreduce_fallback was given gradients, of which commkit does not know the parameters; "
                "call it without, or allreduce_gradients()"
            )
        named = {}
        for name, p in parameters.items():
            if p.grad is None:  # a rank that skips a collective would hang the others
                p.grad = torch.zeros_like(p)
            named[name] = p.grad
        handle.reduce(named)
        handle.end_pass()

    handle.replace(engine, "buffered_allreduce_fallback", reduce_all)


def _at_stage_1_or_2(optimizer: Any, handle: EngineHandle, names: dict[nn.Parameter, str]) -> None:
    def reduce_bucket(tensor: Tensor, communication_data_type: torch.dtype) -> Tensor:
        if tensor.numel() == 0:
            return tensor
        named, at = {}, 0
        for group, place, _ in optimizer.ipg_buckets[communication_data_type].params:
            p = optimizer.bit16_groups[group][place]
            named[names[p]] = tensor.narrow(0, at, p.numel()).view(p.shape)
            at += p.numel()
        handle.reduce(named)
        return tensor

    handle.replace(optimizer, _STAGE_12, reduce_bucket)


def _at_stage_3(optimizer: Any, handle: EngineHandle, names: dict[nn.Parameter, str]) -> None:
    rank, world_size = handle.comm.rank, dist.get_world_size(handle.comm.group)

    def reduce_and_take(
        params_to_reduce: list[nn.Parameter], communication_data_type: torch.dtype
    ) -> list[Tensor]:
        gradients = {names[p]: p.grad for p in params_to_reduce if p.grad is not None}
        handle.reduce(gradients)
        return [
            _part(x, rank, world_size).to(optimizer.gradient_accumulation_dtype)
            for x in gradients.values()
        ]

    handle.replace(optimizer, _STAGE_3, reduce_and_take)


def _part(x: Tensor, rank: int, world_size: int) -> Tensor:
    """A rank's share of ``x`` in ZeRO-3: equal chunks, the last ones shorter."""
    size = -(-x.numel() // world_size)
    start = min(rank * size, x.numel())
    return x.reshape(-1)[start : start + size]

"""Schemes on a DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...comm import DistComm, require_group
from ...config import ConfigError
from ...optim import CommOptimizer, OptimizerScheme
from ...outer import OuterScheme, OuterSync
from ...reducer import Reducer
from ...runtime.agreement import agree, mark_attached, refuse_attached
from ...schemes import make_scheme
from ..agreement import agree_to_attach
from ..at_step import StepHandle, attach_at_step
from ..attach import refuse_double_momentum
from .handle import EngineHandle
from .library import require_deepspeed
from .limits import (
    refuse_split_norm,
    refuse_unsupported,
    require_arranged,
    require_served,
    require_stage,
)
from .masters import Masters, show, stepped_by
from .saving import Kept, check_saving, keep_with_checkpoints
from .settings import Block
from .stages import check_methods, gradients_like, put_in_place

Attached = EngineHandle | StepHandle | OuterSync


def attach(
    engine: Any, scheme: str | Mapping[str, Any] | Path, *, timeout_s: float = 1800.0, **knobs: Any
) -> Attached:
    """Put a scheme to work on an engine that somebody else has built: collective, before the first backward pass.

    Args:
        engine: of ``deepspeed.initialize``. At stages 1 and 2 its config must have ``"reduce_scatter": false``.
        scheme: one that reduces gradients, or local updates at stage 0: its name, a mapping, or a YAML file. An
            optimizer has to be there when the engine is built: :func:`commkit.deepspeed.initialize`.
        timeout_s: seconds after which a stuck collective raises.
        knobs: fields of the scheme.

    Raises:
        ConfigError: unknown scheme or field, a value out of range, or a scheme for another stage.
        As :func:`commkit.deepspeed.initialize` otherwise.

    If any rank is refused, every rank raises.
    """
    error: Exception | None = None
    try:
        require_deepspeed()
        made = require_served(make_scheme(scheme, knobs), str(scheme))
        if isinstance(made, OptimizerScheme):
            raise ConfigError(
                f"scheme {str(scheme)!r} is an optimizer, which the engine has to be built with; use "
                "commkit.deepspeed.initialize"
            )
        stage = int(engine.zero_optimization_stage())
        require_stage(made, str(scheme), stage)
        if isinstance(made, Reducer):
            require_arranged(engine, made)
    except Exception as caught:
        error = caught
    agree(DistComm(require_group(None)), {}, error)
    assert not isinstance(made, OptimizerScheme)
    return attach_engine(engine, made, Block(scheme=str(scheme), timeout_s=timeout_s))


def attach_engine(
    engine: Any, scheme: Reducer | OuterScheme | CommOptimizer, block: Block
) -> Attached:
    """Put ``scheme`` to work on ``engine``, whose own averaging of gradients ends. Collective over all ranks.

    Args:
        engine: fresh from ``deepspeed.initialize``.
        scheme: one that reduces gradients; local updates; or an optimizer, which is the engine's.
        block: the other settings.

    Raises:
        DeepSpeedVersionError: a method of DeepSpeed is not what it was.
        ValueError, TypeError: engine and scheme do not go together.
        RuntimeError: attached before, another rank was refused, or ranks disagree.
    """
    world, error = DistComm(require_group(None)), None
    try:
        refuse_attached(engine.module)
        refuse_unsupported(engine)
        refuse_split_norm(engine, scheme)
        check_saving(engine)
    except Exception as caught:
        error = caught
    agree(world, {}, error)
    put: Callable[[Any, Any, Block], tuple[Attached, Kept]] = _put_reducer
    if isinstance(scheme, CommOptimizer):
        put = _put_optimizer
    elif isinstance(scheme, OuterScheme):
        put = _put_outer
    try:
        handle, kept = put(engine, scheme, block)
    except Exception as caught:
        error = caught
    agree(world, {}, error)  # other pipeline stages have not heard of it
    undo = keep_with_checkpoints(engine, kept, block)
    if isinstance(handle, EngineHandle):
        handle.undo_too(undo)
    engine.commkit = handle
    return handle


def _put_reducer(engine: Any, reducer: Reducer, block: Block) -> tuple[Attached, Kept]:
    group = _data_parallel_group(engine)

    def make() -> Reducer:
        check_methods(engine)
        refuse_double_momentum(reducer, engine.basic_optimizer)
        return reducer

    made, like = agree_to_attach(
        engine.module,
        DistComm(group),
        make,
        lambda: gradients_like(engine),  # type: ignore[arg-type, return-value]
    )
    handle = EngineHandle(engine, made, like, group, block.timeout_s)
    put_in_place(engine, handle)
    mark_attached(engine.module)
    return handle, Kept(made, handle.comm)


def _put_optimizer(engine: Any, optimizer: CommOptimizer, block: Block) -> tuple[Attached, Kept]:
    _average_no_gradients(engine)
    stepped = stepped_by(engine)
    handle = attach_at_step(
        engine.module,
        lambda: optimizer.reducer,
        optimizer,
        _data_parallel_group(engine),
        block.timeout_s,
        stepped=lambda: stepped,
    )
    # DeepSpeed saves rank 0's optimizer for all ranks, so residuals must not be in it.
    optimizer.state_dict = optimizer.shared_state_dict  # type: ignore[method-assign]
    return handle, Kept(optimizer.reducer, handle.comm, after_load=lambda: show(engine, stepped))


def _put_outer(engine: Any, scheme: OuterScheme, block: Block) -> tuple[Attached, Kept]:
    _average_no_gradients(engine)
    stepped = stepped_by(engine)
    masters: dict[str, Tensor] = {}
    if engine.optimizer is not engine.basic_optimizer:
        masters = {name: x.detach() for name, x in stepped.items()}
    method = scheme(
        engine.module, engine.basic_optimizer, _data_parallel_group(engine), masters
    ).start()
    assert isinstance(method.comm, DistComm)
    per_rank: dict[str, Any] = {
        "model": engine.module,
        "optimizer": engine.basic_optimizer,
        "replica": method.replica_state,
    }
    if masters:
        per_rank["masters"] = Masters(stepped)
    return method, Kept(method.reducer, method.comm, {"method": method}, per_rank)


def _data_parallel_group(engine: Any) -> dist.ProcessGroup:
    group: dist.ProcessGroup = (
        engine.mpu.get_data_parallel_group()
        if engine.pipeline_parallelism
        else engine.seq_data_parallel_group
    )
    return group


def _average_no_gradients(engine: Any) -> None:
    """From now on gradients are each rank's own, and so is what DeepSpeed clips; that one of them has overflowed, all
    ranks still hear before anybody steps."""
    engine.enable_backward_allreduce = False
    if engine.pipeline_parallelism:
        engine.pipeline_enable_backward_allreduce = False
    checker = getattr(engine.optimizer, "overflow_checker", None)
    if checker is not None:
        # DeepSpeed also skips where a norm overflows, on the rank that sees it: here that must be all.
        checker.has_overflow_serial = _norm_overflows


def _norm_overflows(parameters: list[Tensor]) -> bool:
    norms = [
        torch.linalg.vector_norm(p.grad, dtype=torch.float32)
        for p in parameters
        if p.grad is not None
    ]
    return bool(norms) and not bool(torch.stack(norms).square().sum().isfinite())

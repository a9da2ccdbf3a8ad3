"""What of DeepSpeed goes together with commkit: everything else is refused, with the remedy."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...config import ConfigError
from ...optim import CommOptimizer, OptimizerScheme
from ...outer import DFedSAM, OuterScheme
from ...reducer import Reducer
from .settings import plain, stage_of

Served = Reducer | OptimizerScheme | OuterScheme


def require_served(scheme: Any, name: str) -> Served:
    """
    Raises:
        ConfigError: a scheme for another kind of training.
    """
    if isinstance(scheme, OuterScheme) and issubclass(scheme.method, DFedSAM):
        raise ConfigError(
            f"commkit.scheme.name={name!r} evaluates every batch twice, in a closure, and DeepSpeed's step takes none; "
            "use it around a loop of your own, or another method with local updates"
        )
    if isinstance(scheme, Served):
        return scheme
    raise ConfigError(
        f"commkit.scheme.name={name!r} is not for DeepSpeed, which shards and serves by itself; use a scheme that "
        "reduces gradients, such as powersgd, an optimizer such as onebit_adam, or local updates such as diloco"
    )


def require_stage(scheme: Served, name: str, stage: int) -> None:
    """
    Raises:
        ConfigError: ZeRO's stage leaves nobody whole tensors to decide on.
    """
    if isinstance(scheme, Reducer) or stage == 0:
        return
    what = (
        "is an optimizer that sends momenta, and ZeRO cuts the optimizer's state across tensors"
        if isinstance(scheme, OptimizerScheme)
        else "lets replicas differ for a while, and ZeRO spreads one replica over all ranks"
    )
    raise ConfigError(
        f"commkit.scheme.name={name!r} {what}, so zero_optimization.stage={stage} must be 0; set it to 0, or "
        "use a scheme that reduces gradients, such as powersgd or sign, at any stage"
    )


def arranged(
    config: dict[str, Any], reducer: Reducer, numel: int
) -> tuple[dict[str, Any], list[str]]:
    """``config`` such that ZeRO's reductions come by where they are replaced, and what was changed.

    Args:
        config: what the user wrote.
        reducer: the scheme.
        numel: elements of all parameters.

    Raises:
        ConfigError: a setting of ZeRO that reduces somewhere else.
    """
    stage = stage_of(config)
    if stage == 0:
        return config, []
    config, notes = plain(config), []
    zero = config["zero_optimization"]
    if stage < 3 and zero.get("contiguous_gradients") is False:
        raise ConfigError(
            "zero_optimization.contiguous_gradients=false sends gradients one by one; leave it out, or set it to true"
        )
    scatter = stage == 3
    if "reduce_scatter" in zero and zero["reduce_scatter"] is not scatter:
        notes.append(
            f"zero_optimization.reduce_scatter={zero['reduce_scatter']!r} is ignored: the scheme decides how "
            "gradients travel"
        )
    zero["reduce_scatter"] = scatter
    if reducer.whole_step and int(zero.get("reduce_bucket_size", 0)) < numel:
        notes.append(
            f"zero_optimization.reduce_bucket_size is {numel}, all parameters: the scheme needs the whole gradient at once"
        )
        zero["reduce_bucket_size"] = numel
    return config, notes


def require_arranged(engine: Any, reducer: Reducer) -> None:
    """
    Raises:
        ConfigError: an engine that was not built with what :func:`arranged` gives.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return
    numel = number_of_elements(engine.module)
    wrong = {}
    if bool(engine.zero_reduce_scatter()) != (stage == 3):
        wrong["reduce_scatter"] = str(stage == 3).lower()
    if stage < 3 and not engine.zero_contiguous_gradients():
        wrong["contiguous_gradients"] = "true"
    if reducer.whole_step and engine.zero_reduce_bucket_size() < numel:
        wrong["reduce_bucket_size"] = str(numel)
    for name, value in wrong.items():
        raise ConfigError(
            f"zero_optimization.{name} must be {value} when the engine is built; set it, or use "
            "commkit.deepspeed.initialize, which does"
        )


def number_of_elements(model: nn.Module) -> int:
    """Of all parameters, also of those that ``zero.Init`` has cut."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in model.parameters())


def refuse_unsupported(engine: Any) -> None:
    """
    Raises:
        ValueError: a feature of the engine that averages gradients in another way.
    """
    for unsupported, feature, remedy in _faults(engine):
        if unsupported:
            raise ValueError(f"commkit does not work with {feature} in DeepSpeed; {remedy}")


def _faults(engine: Any) -> list[tuple[bool, str, str]]:
    config, pipeline = engine._config, bool(engine.pipeline_parallelism)
    tied = pipeline and bool(engine.module.tied_comms)
    leave_out = "leave it out"
    return [
        (
            engine.optimizer is None,
            "an engine without an optimizer",
            "name one, there is nothing to reduce",
        ),
        (
            type(engine.optimizer).__name__ == "BF16_Optimizer",
            "bf16 with float32 gradient accumulation at stages 0 and 1",
            'leave "data_types" out, or use stage 2',
        ),
        (bool(engine.has_moe_layers), "mixtures of experts", "train them without commkit"),
        (engine.sequence_parallel_size > 1, "sequence parallelism", leave_out),
        (
            engine.mp_world_size > 1 and not pipeline,
            "tensor parallelism",
            "use data parallelism, ZeRO or pipeline stages",
        ),
        (tied, "weights that pipeline stages share", "untie them"),
        (bool(engine.zenflow), "ZenFlow", leave_out),
        (bool(engine.is_deepcompile_enabled()), "DeepCompile", "use torch.compile on the model"),
        (
            bool(engine.zero_quantized_gradients()),
            "zero_quantized_gradients",
            "let the scheme quantise",
        ),
        (engine.zero_hpz_partition_size() > 1, "zero_hpz_partition_size", leave_out),
        (
            config.communication_data_type is not None,
            "communication_data_type",
            "leave it out, the scheme decides what is sent",
        ),
        (not engine.gradient_average, "gradient_allreduce_op other than mean", leave_out),
        (bool(config.prescale_gradients), "prescale_gradients", leave_out),
        (config.gradient_predivide_factor != 1.0, "gradient_predivide_factor", leave_out),
    ]


def refuse_split_norm(engine: Any, scheme: Reducer | OuterScheme | CommOptimizer) -> None:
    """
    Raises:
        ValueError: the scheme needs a norm over the model, of which each rank holds one pipeline stage.
    """
    if not engine.pipeline_parallelism:
        return
    if isinstance(scheme, OuterScheme):
        raise ValueError(
            f"{scheme.method.__name__} decides on whole models, of which a pipeline stage is a part; use a scheme that "
            "reduces gradients, or an optimizer"
        )
    reducer = scheme.reducer if isinstance(scheme, CommOptimizer) else scheme
    if reducer.whole_step:
        raise ValueError(
            "the scheme clips by the norm of the whole gradient, of which a pipeline stage has a part; use "
            "gradient_clipping of ds_config"
        )

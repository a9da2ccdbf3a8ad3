"""``deepspeed.initialize`` with the block ``"commkit"`` of ``ds_config``."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from ...comm import DistComm, require_group
from ...config import ConfigError, arguments
from ...optim import DGCSGD, CommOptimizer, OptimizerScheme
from ...optim.onebit import OneBitOptimizer
from ...outer import OuterScheme
from ...reducer import Reducer
from ...runtime.agreement import agree
from ...schemes import make_scheme
from .attach import attach_engine
from .legacy import is_former, translate
from .library import require_deepspeed
from .limits import Served, arranged, number_of_elements, require_served, require_stage
from .settings import BLOCK, Block, plain, read_block, stage_of

_PORT = 29500  # DeepSpeed's default
_CONFIG_ARGUMENTS = ("deepspeed_config", "deepscale_config")
_CLIP_KNOBS = ("max_grad_norm", "clip_norm")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be done, checked before any engine is built.

    Args:
        config: what DeepSpeed is given.
        optimizer: what it is given as the client's.
        block: the settings; None if commkit has nothing to do.
        scheme: what is attached.
        notes: what the user should hear.
    """

    config: dict[str, Any]
    optimizer: Any
    block: Block | None = None
    scheme: Reducer | OuterScheme | CommOptimizer | None = None
    notes: tuple[str, ...] = ()


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = _PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize``, which also does what the block ``"commkit"`` of ``ds_config`` says. Collective.

    ``"commkit": {"scheme": {"name": "powersgd", "rank": 4}}`` takes any scheme that reduces gradients (ZeRO stages 0 to
    3), an optimizer that communicates or local updates (stage 0). Settings of such an optimizer are in the same block,
    ``"optimizer": {"lr": 1e-3}``. For the other fields see :class:`~commkit.adapters.deepspeed.settings.Block`. A
    ``"optimizer"`` block of DeepSpeed's own former OneBitAdam, ZeroOneAdam or OneBitLamb works as it did, and an
    optimizer of ``commkit.optim`` may be given as ``optimizer``. Without any of these it is ``deepspeed.initialize``.

    Args: those of ``deepspeed.initialize``; ``config`` (or ``args.deepspeed_config``) is a mapping or a path, and is
        not changed.

    Returns:
        ``(engine, optimizer, training_dataloader, lr_scheduler)`` of DeepSpeed. ``engine.commkit`` is the attachment:
        ``last_step`` are the :class:`~commkit.StepStats` of the last step, ``close()`` ends it.

    Raises:
        ModuleNotFoundError: DeepSpeed is not installed.
        DeepSpeedVersionError: it is not a version that commkit knows, 0.19.
        ConfigError: the block is wrong, or does not go with the rest of ``ds_config``.
        ValueError, TypeError: scheme and engine do not go together.
        RuntimeError: ranks disagree, or the model is attached already.

    If any rank is refused, every rank raises.
    """
    deepspeed = require_deepspeed()
    backend = deepspeed.accelerator.get_accelerator().communication_backend_name()
    deepspeed.init_distributed(
        backend, distributed_port=distributed_port, dist_init_required=dist_init_required
    )
    if model_parameters is not None:
        model_parameters = list(model_parameters)
    plan, error = None, None
    try:
        given = config if config is not None else config_params
        loaded = deepspeed.load_ds_config(_from_arguments(args, given))
        plan = make_plan(plain(loaded), model, optimizer, model_parameters)
    except Exception as caught:
        error = caught
    told = {} if plan is None or plan.block is None else plan.block.model_dump(mode="json")
    world = DistComm(require_group(None))
    agree(world, {BLOCK: told}, error)
    assert plan is not None
    if world.rank == 0:
        for note in plan.notes:
            _log.warning("%s", note)
    asleep = plan.scheme.dormant() if isinstance(plan.scheme, CommOptimizer) else nullcontext()
    with _without_config(args), asleep:
        result = deepspeed.initialize(
            args=args,
            model=model,
            optimizer=plan.optimizer,
            model_parameters=model_parameters,
            training_data=training_data,
            lr_scheduler=lr_scheduler,
            distributed_port=distributed_port,
            mpu=mpu,
            dist_init_required=dist_init_required,
            collate_fn=collate_fn,
            config=plan.config,
            mesh_param=mesh_param,
        )
    if plan.scheme is not None and plan.block is not None:
        attach_engine(result[0], plan.scheme, plan.block)
    engine, wrapped, loader, scheduler = result
    return engine, wrapped, loader, scheduler


def make_plan(
    config: dict[str, Any], model: nn.Module | None, optimizer: Any, parameters: list[Any] | None
) -> Plan:
    """
    Raises:
        ConfigError: something in ``config`` is wrong, or does not go with something else.
        ValueError, TypeError: a setting of an optimizer is out of range.
    """
    block, notes = _block_of(config, optimizer)
    if block is None:
        if not isinstance(optimizer, CommOptimizer):
            return Plan(config, optimizer)
        name = type(optimizer).__name__
        require_stage(OptimizerScheme(type(optimizer)), name, stage_of(config))
        norm = _clip_norm(config)
        told = (_clips_own(norm),) if norm > 0 else ()
        return Plan(config, optimizer, Block(scheme=name), optimizer, told)
    if model is None:
        raise ValueError("model is missing; give the module to train")
    name = block.scheme if isinstance(block.scheme, str) else str(block.scheme.get("name"))
    scheme = _scheme_of(block, name)
    require_stage(scheme, name, stage_of(config))
    if isinstance(scheme, OptimizerScheme):
        _refuse_other_optimizer(config, optimizer, name)
        scheme, config, note = _clipping(scheme, config, block, _is_pipeline(model))
        built = _built(scheme, block, model, parameters)
        return Plan(config, built, block, built, (*notes, *note))
    if block.optimizer:
        raise ConfigError(
            f"commkit.optimizer is for schemes that are optimizers, and {name!r} is none; use the block "
            '"optimizer" of ds_config'
        )
    if isinstance(optimizer, CommOptimizer):
        raise ConfigError(
            f"commkit.scheme.name={name!r} and the optimizer {type(optimizer).__name__} would both reduce gradients; "
            "leave one of them out"
        )
    if optimizer is None and "optimizer" not in config:
        raise ConfigError(
            f"no optimizer: commkit.scheme.name={name!r} reduces what another one steps by; add a block "
            '"optimizer" to ds_config, or give initialize(optimizer=...)'
        )
    if isinstance(scheme, Reducer):
        config, changes = arranged(config, scheme, number_of_elements(model))
        notes += changes
    return Plan(config, optimizer, block, scheme, tuple(notes))


def _block_of(config: dict[str, Any], optimizer: Any) -> tuple[Block | None, list[str]]:
    """What ``config`` asks of commkit, which is taken out of it."""
    data = config.pop(BLOCK, None)
    if not is_former(config.get("optimizer")) or optimizer is not None:
        return (None if data is None else read_block(data)), []
    former = config.pop("optimizer")
    data = {} if data is None else data
    if not isinstance(data, dict) or {"scheme", "optimizer"} & set(data):
        raise ConfigError(
            f"ds_config has the optimizer {former['type']!r}, which is a scheme of commkit's, and a block {BLOCK!r} "
            "with another; leave one of them out"
        )
    translation = translate(former)
    notes = list(translation.notes)
    if "gradient_clipping" not in config:
        config["gradient_clipping"] = 0.0
        notes.append(
            "gradient_clipping is off, as it was when nothing was said; DeepSpeed's default is now 1.0"
        )
    return read_block({**translation.block, **data}), notes


def _scheme_of(block: Block, name: str) -> Served:
    try:
        return require_served(make_scheme(block.scheme), name)
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(BLOCK) else f"{BLOCK}.{text}") from None


def _refuse_other_optimizer(config: dict[str, Any], optimizer: Any, name: str) -> None:
    other = None
    if optimizer is not None:
        other = f"initialize(optimizer={type(optimizer).__name__})"
    elif "optimizer" in config:
        other = f'the block "optimizer" of ds_config, {config["optimizer"].get("type")!r},'
    if other is not None:
        raise ConfigError(
            f"commkit.scheme.name={name!r} is an optimizer itself, and {other} is another; leave that out and put "
            'lr, weight_decay ... into "commkit": {"optimizer": {...}}'
        )


def _built(
    scheme: OptimizerScheme, block: Block, model: nn.Module, parameters: list[Any] | None
) -> CommOptimizer:
    """The optimizer, with its settings checked as strictly as its scheme."""
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in block.optimizer.items()
    }
    where = f"{BLOCK}.optimizer"
    values = arguments(scheme.optimizer, given, where, given=("params", *scheme.knobs))
    if parameters is None:
        parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        return scheme(parameters, **values)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _clipping(
    scheme: OptimizerScheme, config: dict[str, Any], block: Block, pipeline: bool
) -> tuple[OptimizerScheme, dict[str, Any], list[str]]:
    """DeepSpeed clips what it finds before the optimizer steps, which here is this rank's own gradient. Where the
    optimizer knows a better way, it is the one to clip."""
    norm = _clip_norm(config)
    asked = block.scheme if isinstance(block.scheme, dict) else {}
    own, how = _own_clipping(scheme.optimizer, norm, asked)
    twice = {knob: asked[knob] for knob in own if knob in _CLIP_KNOBS and asked.get(knob)}
    for knob, value in twice.items():
        if pipeline:
            raise ConfigError(
                f"{BLOCK}.scheme.{knob}={value} is of the whole gradient, of which a pipeline stage has a part; use "
                "gradient_clipping of ds_config"
            )
        if norm > 0 and "gradient_clipping" in config:
            raise ConfigError(
                f"gradient_clipping={norm:g} of ds_config and {BLOCK}.scheme.{knob}={value} both clip; leave one out"
            )
    if norm <= 0:
        return scheme, config, []
    if pipeline or not own:  # of a pipeline's gradient DeepSpeed alone knows the norm
        return scheme, config, [_clips_own(norm)]
    off = config | {"gradient_clipping": 0.0}
    if twice:
        return scheme, off, []
    scheme = dataclasses.replace(scheme, knobs={**scheme.knobs, **own})
    return scheme, off, [f"gradient_clipping={norm:g} is done by the optimizer, of {how}"]


def _clip_norm(config: dict[str, Any]) -> float:
    """To which DeepSpeed clips, 1.0 if the config does not say; it was 0 once."""
    from deepspeed.runtime import constants

    return float(config.get(constants.GRADIENT_CLIPPING, constants.GRADIENT_CLIPPING_DEFAULT))


def _clips_own(norm: float) -> str:
    return f"gradient_clipping={norm:g} is of every rank's own gradient, before it is sent"


def _own_clipping(
    optimizer: type[CommOptimizer], norm: float, asked: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """Knobs with which ``optimizer`` clips to ``norm``, and what that clips; none if it has no way of its own."""
    if issubclass(optimizer, DGCSGD):
        return {"clip_norm": norm}, "every rank's gradient, see clip_norm of dgc"
    if not issubclass(optimizer, OneBitOptimizer):
        return {}, ""
    clip = asked.get("clip", "gradient")
    then = (
        "every rank's gradient, by one coefficient for all"
        if clip == "gradient"
        else "the momentum that arrives"
    )
    return {
        "max_grad_norm": norm,
        "clip": clip,
    }, f"the mean gradient before freeze_step, then {then}"


def _is_pipeline(model: nn.Module) -> bool:
    return isinstance(model, require_deepspeed().PipelineModule)


def _from_arguments(args: Any, config: Any) -> Any:
    """``config``, or that of ``args``, as DeepSpeed looks for it."""
    there = [getattr(args, name, None) for name in _CONFIG_ARGUMENTS]
    named = next((value for value in there if value is not None), None)
    if named is not None and config is not None:
        raise ConfigError(
            "a ds_config was given as an argument of initialize and in args.deepspeed_config; leave one of them out"
        )
    config = named if config is None else config
    if config is None:
        raise ConfigError("no ds_config; give initialize(config=...) or args.deepspeed_config")
    return str(config) if isinstance(config, Path) else config


@contextmanager
def _without_config(args: Any) -> Iterator[None]:
    """Inside the block ``args`` name no config: DeepSpeed refuses two."""
    named = {name: getattr(args, name) for name in _CONFIG_ARGUMENTS if hasattr(args, name)}
    for name in named:
        setattr(args, name, None)
    try:
        yield
    finally:
        for name, value in named.items():
            setattr(args, name, value)

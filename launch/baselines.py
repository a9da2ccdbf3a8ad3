"""Torch's own hooks as baselines: ``scheme: {name: "torch:powersgd", rank: 4}`` in a recipe.

They run as torch ships them, faults included, on plain DDP. Torch does not count bytes, so the
records have null where commkit's schemes have numbers; ``commkit compare`` takes the bytes from the
interface. ``torch:ddp`` is DDP without any hook.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch.distributed.algorithms.ddp_comm_hooks import (
    default_hooks,
    post_localSGD_hook,
    powerSGD_hook,
    quantization_hooks,
)
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import commkit
from commkit.comm import DistComm
from commkit.config import ConfigError, validate
from commkit.registry import did_you_mean
from commkit.sharded import PartitionedOptimizer
from launch.attachment import Attachment
from launch.settings import NonNegativeInt, PositiveInt, Section

PREFIX = "torch:"


@dataclass(frozen=True)
class BaselineCost:
    """The little that is known of a step of torch's own. Seconds and bytes."""

    dense_bytes: int | None = None
    payload_bytes: int | None = None
    wire_bytes: int | None = None
    rounds: int | None = None
    comm_seconds: float | None = None
    reduce_seconds: float | None = None
    exposed_comm_seconds: float | None = None
    residual_norm: float | None = None
    num_contributors: int | None = None
    nonfinite: bool | None = None


class NoKnobs(Section):
    pass


class PowerSGDKnobs(Section):
    """Of ``torch:powersgd`` and ``torch:batched_powersgd``."""

    rank: PositiveInt = 4
    start_step: Annotated[int, Field(ge=2)] = 2  # torch's hook cannot start before


class PostLocalSGDKnobs(Section):
    """Of ``torch:post_local_sgd``: plain DDP first, then parameters are averaged every so often."""

    period: PositiveInt = 8  # steps from average to average
    start_step: NonNegativeInt = 100


class Baseline:
    """One of torch's hooks, registered on a DDP model.

    Attributes:
        comm: collectives over DDP's group, for the training thread.
        reducer: of plain DDP and without state, because checkpoints hold one.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self.comm = DistComm(ddp.process_group)
        self.reducer = commkit.schemes.ddp()
        parameters = [p for p in ddp.parameters() if p.requires_grad]
        self._dense_bytes = sum(p.numel() * p.element_size() for p in parameters)
        self._last_gradient = self._backward_end = 0.0
        self._averaging_seconds = 0.0
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]

    @property
    def last_step(self) -> BaselineCost:
        """Exposed is the time from the last gradient to the end of backward, and averaging."""
        exposed = self._backward_end - self._last_gradient + self._averaging_seconds
        return BaselineCost(dense_bytes=self._dense_bytes, exposed_comm_seconds=exposed)

    def backward_ended(self) -> None:
        """To be called as soon as a synchronised backward pass has returned."""
        self._backward_end = time.perf_counter()

    def average_after(self, optimizer: Optimizer, averager: PeriodicModelAverager) -> None:
        """Let ``averager`` average the parameters after each step of ``optimizer``."""

        def average(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            start = time.perf_counter()
            averager.average_parameters(optimizer.param_groups)
            self._averaging_seconds = time.perf_counter() - start

        optimizer.register_step_post_hook(average)

    def close(self) -> None:
        """Nothing to stop."""

    def _on_gradient(self, parameter: torch.Tensor) -> None:
        self._last_gradient = time.perf_counter()


@dataclass(frozen=True)
class _Recipe:
    knobs: type[Section]
    register: Callable[[Baseline, DistributedDataParallel, Optimizer, Any], None]
    stateful: bool = False  # keeps what a checkpoint does not hold


def _nothing(handle: Baseline, ddp: DistributedDataParallel, optimizer: Optimizer, k: Any) -> None:
    pass


def _stateless(hook: Callable[..., Any]) -> Callable[..., None]:
    def register(
        handle: Baseline, ddp: DistributedDataParallel, optimizer: Optimizer, knobs: Any
    ) -> None:
        ddp.register_comm_hook(ddp.process_group, hook)

    return register


def _powersgd(hook: Callable[..., Any]) -> Callable[..., None]:
    def register(
        handle: Baseline, ddp: DistributedDataParallel, optimizer: Optimizer, knobs: PowerSGDKnobs
    ) -> None:
        state = powerSGD_hook.PowerSGDState(
            process_group=ddp.process_group,
            matrix_approximation_rank=knobs.rank,
            start_powerSGD_iter=knobs.start_step,
        )
        ddp.register_comm_hook(state, hook)

    return register


def _post_local_sgd(
    handle: Baseline, ddp: DistributedDataParallel, optimizer: Optimizer, knobs: PostLocalSGDKnobs
) -> None:
    state = post_localSGD_hook.PostLocalSGDState(  # type: ignore[no-untyped-call]
        process_group=ddp.process_group,
        subgroup=None,
        start_localSGD_iter=knobs.start_step,
        post_local_gradient_allreduce=False,
    )
    ddp.register_comm_hook(state, post_localSGD_hook.post_localSGD_hook)
    averager = PeriodicModelAverager(
        period=knobs.period, warmup_steps=knobs.start_step, process_group=ddp.process_group
    )
    handle.average_after(optimizer, averager)


_RECIPES = {
    "torch:ddp": _Recipe(NoKnobs, _nothing),
    "torch:fp16": _Recipe(NoKnobs, _stateless(default_hooks.fp16_compress_hook)),
    "torch:powersgd": _Recipe(PowerSGDKnobs, _powersgd(powerSGD_hook.powerSGD_hook), True),
    "torch:batched_powersgd": _Recipe(
        PowerSGDKnobs, _powersgd(powerSGD_hook.batched_powerSGD_hook), True
    ),
    "torch:quantize_per_tensor": _Recipe(
        NoKnobs, _stateless(quantization_hooks.quantization_pertensor_hook)
    ),
    "torch:quantize_per_channel": _Recipe(
        NoKnobs, _stateless(quantization_hooks.quantization_perchannel_hook)
    ),
    "torch:post_local_sgd": _Recipe(PostLocalSGDKnobs, _post_local_sgd, True),
}
NAMES = tuple(_RECIPES)


def is_baseline(scheme: Mapping[str, Any]) -> bool:
    """Whether a recipe's ``scheme`` block names one of torch's own hooks."""
    return str(scheme.get("name", "")).startswith(PREFIX)


def check(scheme: Mapping[str, Any], resume: bool) -> None:
    """Refuse what can be refused without a model.

    Raises:
        ConfigError: unknown baseline or knob, or a value out of range.
        ValueError: ``resume`` with a hook whose state is not in the checkpoint.
    """
    if is_baseline(scheme):
        recipe, _ = _resolve(scheme)
        if resume and recipe.stateful:
            raise ValueError(
                f"--resume: {scheme['name']} keeps state that torch does not let us save, so the "
                "run would not go on as it was; start it anew in another --out"
            )


def attach(
    model: torch.nn.Module,
    optimizer: Optimizer,
    scheme: Mapping[str, Any],
    mesh: DeviceMesh | None = None,
    debug: commkit.Debug | None = None,
    members: commkit.Elastic | None = None,
) -> Attachment:
    """Reduce the model's gradients as ``scheme`` says, by commkit or by one of torch's hooks; ``mesh`` is that of a
    sharded model with replicas; ``debug`` and ``members`` are those of :func:`commkit.attach`.

    Raises:
        ConfigError: unknown name or field, or a value out of range.
        TypeError, RuntimeError, ValueError: as :func:`commkit.attach`.
    """
    if isinstance(optimizer, commkit.optim.CommOptimizer):
        return commkit.attach(model, optimizer, mesh=mesh, debug=debug, members=members)
    if isinstance(optimizer, PartitionedOptimizer):
        return commkit.attach(model, optimizer, debug=debug)
    if not is_baseline(scheme):
        return commkit.attach(model, scheme, optimizer, mesh=mesh, debug=debug, members=members)
    if debug not in (None, commkit.Debug()):
        raise ValueError(f"debug is for commkit's schemes, not for {scheme['name']}; leave it out")
    assert isinstance(model, DistributedDataParallel)
    recipe, knobs = _resolve(scheme)
    handle = Baseline(model)
    recipe.register(handle, model, optimizer, knobs)
    return handle


def _resolve(scheme: Mapping[str, Any]) -> tuple[_Recipe, Section]:
    name = scheme["name"]
    if name not in _RECIPES:
        hint = did_you_mean(name, list(NAMES))
        raise ConfigError(
            f"scheme.name: unknown baseline {name!r}{hint}; known: {', '.join(NAMES)}"
        )
    fields = {key: value for key, value in scheme.items() if key != "name"}
    recipe = _RECIPES[name]
    return recipe, validate(recipe.knobs, fields, f"scheme {name}")

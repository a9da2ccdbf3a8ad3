"""The optimizer that a run's settings ask for."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import SGD, AdamW, Optimizer

from commkit.optim import AdaptiveBrakingSGD, OptimizerScheme
from commkit.schemes import make_scheme
from commkit.sharded import PartitionScheme
from commkit.straggler import StragglerScheme
from launch.baselines import is_baseline
from launch.settings import TrainSettings


def make_optimizer(
    model: torch.nn.Module, settings: TrainSettings, mesh: DeviceMesh | None = None
) -> Optimizer:
    """The optimizer; weight decay is for matrices only. A scheme that is an optimizer itself takes the
    place of the one of ``settings.optim``, with its settings; one that cuts its state does so over ``mesh``.

    Raises:
        ValueError: such a scheme is built after another optimizer than ``settings.optim.name``, or a
            value is out of range.
    """
    optim = settings.optim
    groups = decaying_groups(model)
    common: dict[str, Any] = {"lr": optim.lr, "weight_decay": optim.weight_decay}
    special: dict[str, Any] = {"betas": optim.betas}
    if optim.name == "sgd":
        special = {"momentum": optim.momentum}
    scheme = None if is_baseline(settings.scheme) else make_scheme(settings.scheme)
    if isinstance(scheme, OptimizerScheme):
        if scheme.like != optim.name:
            raise ValueError(
                f"optim.name={optim.name!r} does not fit scheme {settings.scheme['name']!r}, which takes "
                f"the place of {scheme.like!r}; set optim.name to {scheme.like}"
            )
        offered = special | {"warmup_steps": settings.schedule.warmup}
        return scheme(groups, **common, **_accepted(scheme, offered))
    if isinstance(scheme, StragglerScheme) and scheme.braking is not None:
        if optim.name != "sgd":
            raise ValueError(
                f"optim.name={optim.name!r} does not brake, as scheme.braking={scheme.braking:g} asks for; set "
                "optim.name to sgd, or leave braking out"
            )
        return AdaptiveBrakingSGD(groups, **common, **special, rho=scheme.braking)
    if isinstance(scheme, PartitionScheme):
        assert mesh is not None
        named: list[dict[str, Any]] = [
            {"params": [(n, p) for n, p in model.named_parameters() if p.ndim >= 2]},
            {
                "params": [(n, p) for n, p in model.named_parameters() if p.ndim < 2],
                "weight_decay": 0.0,
            },
        ]
        inner = SGD if optim.name == "sgd" else partial(AdamW, fused=True)
        return scheme(named, inner, mesh, optim.grad_clip, **common, **special)
    if optim.name == "sgd":
        return SGD(groups, **common, **special)
    return AdamW(groups, **common, **special, fused=True)


def decaying_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Parameter groups: weight decay is for matrices only."""
    return [
        {"params": [p for p in model.parameters() if p.ndim >= 2]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


def _accepted(scheme: OptimizerScheme, offered: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``offered`` the optimizer takes and the scheme's block has not given."""
    parameters = inspect.signature(scheme.optimizer).parameters
    return {k: v for k, v in offered.items() if k in parameters and k not in scheme.knobs}

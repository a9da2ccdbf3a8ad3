"""The optimizer that a run's settings ask for."""

from typing import Any

import torch
from torch.optim import SGD, AdamW, Optimizer

from launch.settings import OptimSettings


def make_optimizer(model: torch.nn.Module, settings: OptimSettings) -> Optimizer:
    """The optimizer; weight decay is for matrices only."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim >= 2]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    if settings.name == "sgd":
        return SGD(
            groups, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    return AdamW(
        groups, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )

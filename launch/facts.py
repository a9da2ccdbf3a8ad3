"""What ``summary.json`` says of a run, besides what its records add up to."""

import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import commkit
from launch.gpt import count_parameters
from launch.settings import TrainSettings
from launch.tasks import Task


def facts_of(
    settings: TrainSettings,
    task: Task,
    model: nn.Module,
    device: torch.device,
    *,
    world_size: int,
    steps: int,
    seconds: float,
    validation: Mapping[str, float],
) -> dict[str, Any]:
    """What it says whatever the scheme.

    Args:
        world_size: ranks, whatever they do.
        steps: done.
        seconds: of training, also before the last resumption.
        validation: final metrics.
    """
    return {
        "scheme": settings.scheme["name"],
        "world_size": world_size,
        "steps": steps,
        "parameters": count_parameters(model),
        "buffer_bytes": sum(b.numel() * b.element_size() for b in model.buffers()),
        "device": device.type,
        "task": settings.task,
        "data": task.describe(),
        **validation,
        "wall_seconds": seconds,
        "versions": software(),
    }


def software() -> dict[str, str]:
    """Versions."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commkit": commkit.__version__,
    }

"""What share of elements a sparse scheme really sends: at least one of each tensor."""

from __future__ import annotations

from torch import nn

from commkit.compressors import TopK
from launch import digits, gpt
from launch.settings import DigitsSettings, ModelSettings
from trials.tasks import TASKS

MIN_NUMEL = 1024  # the schemes' default: smaller tensors stay dense


def real_density(task: str, density: float) -> float:
    """Share of the elements of the task's compressed tensors that top-k sends."""
    numels = [p.numel() for p in _model(task).parameters() if p.numel() >= MIN_NUMEL]
    return sum(TopK(density).k(numel) for numel in numels) / sum(numels)


def _model(task: str) -> nn.Module:
    size = TASKS[task]
    if size.kind == "gpt":
        return gpt.build(ModelSettings(**size.recipe["model"]), seed=0)
    return digits.build(DigitsSettings(**size.recipe["digits"]), seed=0)

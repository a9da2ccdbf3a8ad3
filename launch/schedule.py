"""The learning-rate schedule: a function of the step and of its own settings, nothing else."""

import math

from torch.optim import Optimizer

from launch.settings import ScheduleSettings, TrainSettings


def learning_rate(step: int, peak: float, settings: ScheduleSettings) -> float:
    """Learning rate of optimizer step ``step``, counted from 1.

    Linear warm-up to ``peak`` over ``settings.warmup`` steps, then a cosine that reaches
    ``settings.min_lr`` at ``settings.length``, then constant. When training stops does not enter:
    a run stopped early, or resumed to go on for longer, follows the same curve.
    """
    if step <= settings.warmup:
        return peak * step / settings.warmup
    progress = min(1.0, (step - settings.warmup) / (settings.length - settings.warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.min_lr + (peak - settings.min_lr) * cosine


def set_learning_rate(optimizer: Optimizer, step: int, settings: TrainSettings) -> float:
    """Give ``optimizer`` that of step ``step``, counted from 1; returns it."""
    rate = learning_rate(step, settings.optim.lr, settings.schedule)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate

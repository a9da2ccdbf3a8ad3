"""The learning-rate schedule: a function of the step and of its own settings, nothing else."""

import math

from launch.settings import ScheduleSettings


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

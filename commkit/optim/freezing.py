"""When is Adam's variance steady enough to be frozen?"""

from __future__ import annotations


class VarianceWatch:
    """The variance is steady when its 1-norm has changed little over ``window`` steps (Tang et al. 2021,
    section 7.1): ``threshold <= |v_t| / |v_{t - window}| <= 1 / threshold``.

    The variance falls from an early peak, so the ratio rises to 1; the upper bound keeps out a variance
    that still grows.

    Args:
        window: steps between the two; 1 / (1 - beta2).
        warmup_steps: never before this step, the end of the learning-rate warm-up.
        threshold: in (0, 1); the paper's 0.96. Nearer to 1 freezes later.

    Raises:
        ValueError: threshold outside (0, 1), or negative warmup_steps.
    """

    def __init__(self, window: int, warmup_steps: int, threshold: float) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"ratio_threshold={threshold} must be in (0, 1); use for example 0.96")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps} must be >= 0")
        self.window = window
        self.warmup_steps = warmup_steps
        self.threshold = threshold
        self.norms: list[float] = []  # the last `window` norms, oldest first
        self.steps = 0

    def settled(self, norm: float) -> bool:
        """Take the norm after one more step, and say whether it is time."""
        self.steps += 1
        before = self.norms.pop(0) if len(self.norms) == self.window else 0.0
        self.norms.append(norm)
        if before == 0 or self.steps < self.warmup_steps:
            return False
        return self.threshold <= norm / before <= 1 / self.threshold

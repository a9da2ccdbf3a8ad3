"""The two tasks at the size of the convergence table, and the learning rates tuned for dense training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Inner = Literal["adamw", "sgd"]


@dataclass(frozen=True)
class Size:
    """One task.

    Args:
        batch: samples in a step over all ranks, so that 2 and 4 ranks see the same data.
        recipe: sections of ``launch/settings.py`` besides optimizer, schedule and batch.
        lr: by inner optimizer, the best of ``sweep`` for dense training with 2 ranks and seed 0.
        sweep: by inner optimizer, the learning rates tried.
        figure: what the verdict is about.
        seconds: that a trial takes on 2 cores, by number of ranks; for the expected total.
        optim: by inner optimizer, its other settings.
    """

    steps: int
    batch: int
    recipe: Mapping[str, Any]
    lr: Mapping[Inner, float]
    sweep: Mapping[Inner, tuple[float, ...]]
    figure: Literal["val_loss", "val_accuracy"]
    seconds: Mapping[int, float]
    optim: Mapping[Inner, Mapping[str, Any]] = field(default_factory=dict)


# AdamW does not need clipping here, and what it does differs between schemes that reduce gradients and optimizers
# that reduce something else. Its second beta is such that the variance has settled when 1-bit Adam freezes it.
# SGD on a transformer does need it: without, the best rate is next to one that diverges.
_ADAMW = {"betas": [0.9, 0.99], "grad_clip": 0.0}
_SGD = {"momentum": 0.9, "grad_clip": 0.0}

TASKS: Mapping[str, Size] = {
    "gpt": Size(
        steps=300,
        batch=16,
        recipe={
            "model": {"layers": 2, "heads": 4, "width": 64, "context": 64},
            "eval": {"batches": 16, "batch_size": 64},
        },
        lr={"adamw": 3e-3, "sgd": 0.1},
        sweep={
            "adamw": (1e-3, 2e-3, 3e-3, 4e-3, 8e-3),
            "sgd": (0.025, 0.05, 0.1, 0.2, 0.4),
        },
        figure="val_loss",
        seconds={2: 7.0, 4: 11.0},
        optim={
            "adamw": {**_ADAMW, "weight_decay": 0.1},
            "sgd": {**_SGD, "weight_decay": 0.0, "grad_clip": 1.0},
        },
    ),
    "digits": Size(
        steps=200,
        batch=64,
        recipe={"digits": {"width": 16}, "eval": {"batch_size": 128}},
        lr={"adamw": 3.2e-2, "sgd": 0.4},
        sweep={
            "adamw": (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
            "sgd": (0.05, 0.1, 0.2, 0.4, 0.8),
        },
        figure="val_accuracy",
        seconds={2: 3.0, 4: 5.0},
        optim={
            "adamw": {**_ADAMW, "weight_decay": 0.1},
            "sgd": {**_SGD, "weight_decay": 5e-4},
        },
    ),
}

"""What a sweep of learning rates found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from trials.table import Done
from trials.tasks import TASKS


def tables(done: Sequence[Done]) -> dict[str, list[dict[str, Any]]]:
    """One table for each task and system, the best learning rate marked."""
    groups = dict.fromkeys((d.trial.task, d.trial.system.name) for d in done)
    return {
        f"{task}, {name}": rows(
            [d for d in done if (d.trial.task, d.trial.system.name) == (task, name)]
        )
        for task, name in groups
    }


def rows(done: Sequence[Done]) -> list[dict[str, Any]]:
    """The learning rates of one task and system. The validation loss decides: it is finer than accuracy."""
    losses = {d.trial.lr: d.value("val_loss") for d in done if d.finished}
    finite = {lr: loss for lr, loss in losses.items() if math.isfinite(loss)}
    best = min(finite, key=lambda lr: finite[lr]) if finite else None
    return [_row(d, d.trial.lr == best) for d in done]


def _row(done: Done, best: bool) -> dict[str, Any]:
    line: dict[str, Any] = {"lr": done.trial.lr}
    if not done.finished:
        return line | {"validation loss": done.result["error"]}
    loss = done.value("val_loss")
    line["validation loss"] = round(loss, 4) if math.isfinite(loss) else "diverged"
    if TASKS[done.trial.task].figure == "val_accuracy":
        line["accuracy %"] = round(100 * done.value("val_accuracy"), 2)
    line["first loss"] = round(done.result["first_loss"], 4)
    line["CPU seconds"] = done.result["cpu_seconds"]
    return line | {"best": "yes" if best else ""}

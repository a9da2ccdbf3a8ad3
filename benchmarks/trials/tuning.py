"""What a sweep of learning rates, or of outer settings, found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
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
    """The settings of one task and system. The mean validation loss over the tuning seeds decides: it is finer than
    accuracy, and one seed may be lucky near the edge of stability."""
    by_setting: dict[Any, list[Done]] = {}
    for d in done:
        by_setting.setdefault((d.trial.lr, d.trial.outer), []).append(d)
    means = {setting: fmean(_losses(mine)) for setting, mine in by_setting.items()}
    finite = {setting: mean for setting, mean in means.items() if math.isfinite(mean)}
    best = min(finite, key=lambda setting: finite[setting]) if finite else None
    return [_row(mine, setting == best) for setting, mine in by_setting.items()]


def _losses(done: Sequence[Done]) -> list[float]:
    """The validation loss of each seed; not finite of one that failed or diverged."""
    return [d.value("val_loss") if d.finished else math.nan for d in done]


def _row(done: Sequence[Done], best: bool) -> dict[str, Any]:
    trial = done[0].trial
    line: dict[str, Any] = {"lr": trial.lr} if trial.lr is not None else {}
    line |= dict(trial.outer)
    failed = [d for d in done if not d.finished]
    if failed:
        return line | {"validation loss": failed[0].result["error"]}
    losses = _losses(done)
    mean = fmean(losses)
    line["validation loss"] = round(mean, 4) if math.isfinite(mean) else "diverged"
    line["of each seed"] = " ".join(f"{loss:.4f}" for loss in losses)
    if TASKS[trial.task].figure == "val_accuracy":
        line["accuracy %"] = round(100 * fmean(d.value("val_accuracy") for d in done), 2)
    return line | {"best": "yes" if best else ""}

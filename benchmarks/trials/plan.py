"""What is run, in which order, with which recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from trials.systems import DENSE, System
from trials.tasks import TASKS, Size

SEEDS = 3
TUNING_RANKS, TUNING_SEEDS = 2, (100, 101, 102)  # none of the table's
TUNING_OUTER = {"ranks": 4, "seed": 100}  # likewise
QUICK_STEPS = 6


@dataclass(frozen=True)
class Trial:
    """One training.

    Args:
        lr: instead of the tuned one, while tuning.
        steps: instead of the task's.
        outer: fields of the scheme, while tuning those.
    """

    task: str
    system: System
    ranks: int
    seed: int
    lr: float | None = None
    steps: int | None = None
    outer: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """``task/system/ranks/seed``, and what is being tuned, if anything."""
        name = f"{self.task}/{self.system.name}/{self.ranks}/{self.seed}"
        parts = [f"lr{self.lr:g}"] if self.lr is not None else []
        parts += [f"{key}{value}" for key, value in self.outer]
        return "/".join([name, "-".join(parts)]) if parts else name

    def file(self, work: Path) -> Path:
        """Its result in the directory of results."""
        return work / f"{self.name}.json"

    @property
    def size(self) -> Size:
        return TASKS[self.task]

    def recipe(self) -> dict[str, Any]:
        """What ``launch/train.py`` is given, but for the data."""
        size, inner = self.size, self.system.inner_of(self.task)
        steps = self.steps or size.steps
        lr = self.lr or self.system.lr.get(self.task) or size.lr[inner]
        warmup = max(1, round(steps * size.warmup[inner]))
        recipe = {
            "task": size.kind,
            "seed": self.seed,
            "steps": steps,
            "device": "cpu",
            "checkpoint": {"every": 0},
            "batch": {"per_rank": size.batch // self.ranks},
            "optim": {"name": inner, "lr": lr, **size.optim[inner]},
            "schedule": {"warmup": warmup, "length": steps, "min_lr": lr / 20},
            "scheme": {**self.system.scheme, **dict(self.outer)},
        }
        return merged(merged(recipe, size.recipe), self.system.overrides.get(self.task, {}))


def merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """``low`` with the fields of ``high`` over it, mappings merged."""
    result = dict(low)
    for key, value in high.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = merged(old, value) if both else value  # type: ignore[arg-type]
    return result


def table_trials(
    systems: Sequence[System], only: Sequence[str], quick: bool = False
) -> list[Trial]:
    """Every system on every task, seed after seed, so that a table cut short has all rows.

    Raises:
        ValueError: ``only`` fits nothing.
    """
    trials = [
        Trial(task, system, ranks, seed, steps=QUICK_STEPS if quick else None)
        for seed in range(SEEDS)
        for task in TASKS
        for ranks in sorted({ranks for system in systems for ranks in system.ranks})
        for system in systems
        if ranks in system.ranks and task in system.tasks
    ]
    return chosen(trials, only)


def tuning_trials(
    systems: Sequence[System], only: Sequence[str], quick: bool = False
) -> list[Trial]:
    """Every learning rate of the sweeps with every tuning seed; of the dense rows if ``only`` says nothing else.

    Raises:
        ValueError: ``only`` fits nothing.
    """
    trials = [
        Trial(task, system, TUNING_RANKS, seed, lr=lr, steps=QUICK_STEPS if quick else None)
        for task in TASKS
        for system in systems
        if task in system.tasks
        for lr in system.sweep.get(task) or TASKS[task].sweep[system.inner_of(task)]
        for seed in TUNING_SEEDS
    ]
    return chosen(trials, only or (f"*/{DENSE}*",))


def outer_tuning_trials(
    systems: Sequence[System], only: Sequence[str], quick: bool = False
) -> list[Trial]:
    """Every outer setting of the systems that have several to choose from.

    Raises:
        ValueError: ``only`` fits nothing.
    """
    steps = QUICK_STEPS if quick else None
    trials = [
        Trial(task, system, steps=steps, outer=tuple(outer.items()), **TUNING_OUTER)
        for system in systems
        for task in system.tasks
        for outer in system.outer_sweep
    ]
    return chosen(trials, only)


def chosen(trials: Sequence[Trial], only: Sequence[str]) -> list[Trial]:
    """Trials that fit one of the patterns ``task/system/ranks/seed``, whose end may be left out."""
    kept = [trial for trial in trials if not only or any(_fits(trial, p) for p in only)]
    if not kept:
        raise ValueError(
            f"--only: {' '.join(only)} fits no trial; give task/system/ranks/seed, such as "
            "'gpt/powersgd' or '*/dense-*/2/0'; systems: "
            + " ".join(dict.fromkeys(trial.system.name for trial in trials))
        )
    return kept


def _fits(trial: Trial, pattern: str) -> bool:
    parts = zip(pattern.split("/"), trial.name.split("/"), strict=False)
    return all(fnmatchcase(part, wanted) for wanted, part in parts)

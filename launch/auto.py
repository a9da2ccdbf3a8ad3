"""``--scheme auto``: the scheme that a probe asks for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from commkit.advise import Advice, Question, Row, advise
from commkit.outer import OuterScheme
from commkit.probe import Extent, Probe, load_probe
from commkit.schemes import make_scheme
from launch.expectation import SETTLING, Expectation
from launch.probe import run
from launch.settings import TrainSettings
from launch.tasks import Task
from launch.world import World

AUTO = "auto"
# What leaves the recipe's optimizer and its settings as they are. DiLoCo stands for local updates.
CANDIDATES = ("ddp", "bf16", "int8", "int4", "sign", "powersgd", "topk", "diloco")
CHECKED_STEPS = 100


def pick(
    settings: TrainSettings,
    task: Task,
    world: World,
    device: torch.device,
    file: Path | None,
) -> tuple[TrainSettings, Expectation]:
    """The settings with the scheme that the probe asks for. Collective over all ranks, which have joined.

    Args:
        file: a probe of this model; None: a short one is made now.

    Raises:
        ProbeError: a file that is no probe, or one of another model or another number of ranks.
        ConfigError: nothing fits the memory.
    """
    if file is None:
        probe = run(settings, task, world, device, Extent.short().of(CANDIDATES))
    else:
        probe = load_probe(file)
        probe.require_model(task.build())
        probe.require_ranks(world.size)
    advice = advise(Question(probe, schemes=_candidates(probe), longest=_longest(settings.steps)))
    scheme = _block(advice.choice)
    if world.rank == 0:
        print(f"scheme auto: {advice.reason}", file=sys.stderr, flush=True)
    return settings.model_copy(update={"scheme": scheme}), _expectation(advice, settings.steps)


def _candidates(probe: Probe) -> Sequence[str]:
    """Of what was timed."""
    timed = {one.scheme for one in probe.compression}
    return [name for name in CANDIDATES if name in timed]


def _longest(steps: int) -> int:
    """Rounds of which a run has ten at least."""
    return max(1, steps // 10)


def _block(row: Row) -> dict[str, Any]:
    if isinstance(make_scheme(row.name), OuterScheme):
        return {"name": row.name, "sync_every": row.prediction.sync_every}
    return {"name": row.name}


def _expectation(advice: Advice, steps: int) -> Expectation:
    found = advice.choice.prediction
    return Expectation(
        advice.choice.name,
        advice.reason,
        found.step_s,
        found.sync_every > 1,
        found.sync_every,
        min(steps, max(CHECKED_STEPS, found.sync_every + SETTLING)),
    )

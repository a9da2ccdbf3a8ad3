"""Measure links, a recipe's model and compression on the machines at hand, for `commkit advise`.

    torchrun --nproc-per-node 2 -m commkit.cli probe --config configs/ddp.yaml --out probe.json

Under any launcher, with any number of ranks and nodes; on one rank without any.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import tyro

from commkit.comm import DistComm, require_group
from commkit.config import apply_overrides, load_yaml, validate
from commkit.probe import Extent, Probe, Subject, measure
from commkit.probe.table import tables
from commkit.tables import aligned
from launch.heap import keep_freed_memory
from launch.loop import autocast
from launch.optimizer import make_optimizer
from launch.settings import TrainSettings
from launch.tasks import Task, make_task
from launch.world import World


@dataclass(frozen=True)
class Arguments:
    """Measure links, a recipe's model, compression and memory; write them to a file and print tables."""

    config: Path = Path(__file__).resolve().parent.parent / "configs" / "ddp.yaml"
    """YAML file of a recipe, whose model is measured; its scheme does not matter."""
    overrides: Annotated[
        tuple[str, ...],
        tyro.conf.arg(name="set", metavar="A.B=VALUE"),
        tyro.conf.UseAppendAction,
    ] = ()
    """Replace one field of the recipe; VALUE is read as YAML. May be given many times."""
    out: Path = Path("probe.json")
    """Where rank 0 writes."""
    schemes: str = ""
    """Whose compression is timed, with commas; all that `commkit advise` knows if not given."""
    quick: bool = False
    """Seconds in place of a minute or two: fewer and shorter messages and steps."""


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 for bad input."""
    arguments = tyro.cli(Arguments, args=words, prog="commkit probe")
    world = World.from_environment()
    try:
        chosen = [name.strip() for name in arguments.schemes.split(",") if name.strip()]
        extent = Extent.short() if arguments.quick else Extent()
        extent = extent.of(chosen) if chosen else extent
        recipe = apply_overrides(load_yaml(arguments.config), list(arguments.overrides))
        settings = validate(TrainSettings, recipe, str(arguments.config))
        device = world.device(settings.device)
        if device.type == "cpu":
            keep_freed_memory()
        task = make_task(settings)
    except (ValueError, OSError) as error:
        if world.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    world.join(device)
    try:
        probe = run(settings, task, world, device, extent)
        if world.rank == 0:
            arguments.out.write_text(probe.model_dump_json(indent=1) + "\n", encoding="utf-8")
            show(probe)
            print(f"\nWritten: {arguments.out}")
        DistComm(require_group(None)).barrier()
    finally:
        dist.destroy_process_group()
    return 0


def run(
    settings: TrainSettings, task: Task, world: World, device: torch.device, extent: Extent
) -> Probe:
    """Probe with the recipe's model and batches. Collective over all ranks, which have joined."""

    def say(text: str) -> None:
        if world.rank == 0:
            print(f"probe: {text}", file=sys.stderr, flush=True)

    return measure(subject_of(settings, task, world, device), extent, world.local_size, say=say)


def subject_of(settings: TrainSettings, task: Task, world: World, device: torch.device) -> Subject:
    """The recipe's model, batches and optimizer, of their own: a run that follows starts from fresh ones."""
    settings = settings.model_copy(update={"scheme": {"name": "noop"}})
    model = task.build().to(device)
    optimizer = make_optimizer(model, settings)
    batches = iter(task.loader(world.rank, world.size))
    count = settings.batch.accumulate

    def loss(wrapped: torch.nn.Module) -> torch.Tensor:
        with autocast(device, settings.precision):
            return task.loss(wrapped, next(batches).to(device)) / count

    def step() -> None:
        if settings.optim.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    return Subject(model, loss, step, count)


def show(probe: Probe) -> None:
    """Print tables."""
    for title, rows in tables(probe):
        print(f"\n{title}")
        for line in aligned(rows, rights=range(1, len(rows[0]))):
            print(line)

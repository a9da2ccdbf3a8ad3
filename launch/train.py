"""The one reference training program.

    torchrun --nproc-per-node 2 launch/train.py --config configs/powersgd.yaml --out runs/powersgd

Also runs without torchrun, as a single process. What it writes is described in
``launch/rundir.py``, what it can be told in ``launch/settings.py``.
"""

import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: find `launch`

import torch
import torch.distributed as dist
import tyro
from torch.nn.parallel import DistributedDataParallel

import commkit
from commkit import ShardedReplicas
from commkit.config import ConfigError, apply_overrides, load_yaml, validate
from commkit.outer import OuterScheme, OuterSync
from commkit.schemes import make_scheme
from launch import asynchronous, auto, baselines, coordinated, elastic, sharding
from launch.expectation import Expectation
from launch.facts import facts_of
from launch.gpt import count_parameters
from launch.heap import keep_freed_memory
from launch.interface import InterfaceMeter, meter_from_environment
from launch.loop import Trainer
from launch.optimizer import make_optimizer
from launch.rundir import RunDirectory
from launch.settings import RESUMABLE_CHANGES, TrainSettings
from launch.sinks import open_sinks, require_packages
from launch.tasks import Task, make_task
from launch.world import LauncherWatch, World

# Rank 0 reports an error that all ranks share. A rank that its launcher has not ended within this
# time has an error of its own to report.
PATIENCE_S = 10.0


@dataclass(frozen=True)
class Arguments:
    """Train the reference model."""

    config: Path
    """YAML file of a recipe, such as configs/powersgd.yaml."""
    overrides: Annotated[
        tuple[str, ...],
        tyro.conf.arg(name="set", metavar="A.B=VALUE"),
        tyro.conf.UseAppendAction,
    ] = ()
    """Replace one field of the recipe; VALUE is read as YAML. May be given many times."""
    steps: int | None = None
    """When to stop, counted from the very first step; the schedule stays as it is."""
    out: Path | None = None
    """Where to write; runs/NAME for configs/NAME.yaml if not given."""
    resume: bool = False
    """Continue the run in --out from its newest complete checkpoint."""
    scheme: Literal["auto"] | None = None
    """Which scheme, in place of the recipe's: "auto" is what a probe asks for; see `commkit advise`. A resumed run keeps the
    one that was chosen."""
    probe: Path | None = None
    """For --scheme auto: what `commkit probe` wrote with this model and as many ranks; none: a short one is made."""


class SetupError(Exception):
    """The run cannot start for a reason its user can mend; the message is the whole story."""


@dataclass
class Job:
    """What the arguments ask for, checked before any communication."""

    settings: TrainSettings
    run: RunDirectory
    resume: bool
    world: World
    device: torch.device
    task: Task = field(repr=False)
    meter: InterfaceMeter | None = None
    expectation: Expectation | None = None  # of the scheme that was chosen for it


def main(words: Sequence[str] | None = None) -> None:
    """Run the program; ``words`` are its arguments, the command line's if not given."""
    warnings.filterwarnings(
        "ignore", message="'set_vital' is deprecated"
    )  # torchdata on torch 2.13
    arguments = tyro.cli(Arguments, args=words)
    try:
        job = prepare(arguments)
        if arguments.scheme == auto.AUTO and _saved_scheme(arguments) is None:
            choose(job, arguments.probe)
        role = elastic_run(job) if job.settings.elastic else role_of(job)
        trainer = set_up(job) if role is None else None
    except SetupError as error:
        refuse(error)
    if role is not None:
        role()
    elif trainer is not None:
        train(trainer)


def prepare(
    arguments: Arguments, read: "Callable[[Arguments], TrainSettings] | None" = None
) -> Job:
    """Check everything that can be checked alone. ``read`` makes settings of the arguments, where they do not name a
    recipe."""
    world = World.from_environment()
    try:
        settings = (read or read_settings)(arguments)
        baselines.check(settings.scheme, arguments.resume)
        elastic.check(settings)
        run = RunDirectory(arguments.out or Path("runs") / arguments.config.stem)
        if arguments.resume:
            check_same_run(run, settings)
        elif settings.elastic is None or world.rank == 0:  # who joins a run finds its checkpoints
            run.refuse_to_overwrite()
        require_packages(settings)
        if world.rank == 0:
            run.lock()
        device = world.device(settings.device)
        if device.type == "cpu":
            keep_freed_memory()
        task = make_task(settings)
        meter = meter_from_environment(run.path, world.rank, world.local_rank, arguments.resume)
    except (ValueError, OSError) as error:
        raise SetupError(str(error)) from error
    return Job(settings, run, arguments.resume, world, device, task, meter)


def read_settings(arguments: Arguments) -> TrainSettings:
    """The recipe with the command line's changes, checked."""
    overrides = list(arguments.overrides)
    if arguments.steps is not None:
        overrides.append(f"steps={arguments.steps}")
    data = apply_overrides(load_yaml(arguments.config), overrides)
    if arguments.scheme == auto.AUTO:
        data["scheme"] = _saved_scheme(arguments) or {"name": "ddp"}  # until it is chosen
    elif arguments.probe is not None:
        raise ConfigError("--probe: given without --scheme auto; leave it out, or let it choose")
    return validate(TrainSettings, data, str(arguments.config))


def _saved_scheme(arguments: Arguments) -> dict[str, Any] | None:
    """What was chosen for the run that is resumed, if any."""
    run = RunDirectory(arguments.out or Path("runs") / arguments.config.stem)
    if not arguments.resume or not run.config.is_file():
        return None
    scheme: dict[str, Any] = load_yaml(run.config)["scheme"]
    return scheme


def choose(job: Job, file: Path | None) -> None:
    """Give the job the scheme that a probe asks for. Collective.

    Raises:
        SetupError: the probe cannot be used, or nothing fits.
    """
    settings, world = job.settings, job.world
    if sharding.is_sharded(settings):
        raise SetupError("--scheme auto: chooses for replicas that are whole; set fsdp.shards to 0")
    if settings.elastic:
        raise SetupError(
            "--scheme auto: probes ranks that stay, and elastic workers may not; run `commkit advise` first and name "
            "the scheme"
        )
    try:
        world.join(job.device)
        job.settings, job.expectation = auto.pick(settings, job.task, world, job.device, file)
    except (ValueError, TypeError, RuntimeError) as error:
        raise SetupError(str(error)) from error


def check_same_run(run: RunDirectory, settings: TrainSettings) -> None:
    """Refuse to go on with settings under which the records would not be those of one run.

    Raises:
        ValueError: a setting that shapes the result differs from the saved ``config.yaml``.
    """
    if not run.config.is_file():
        return  # killed before its first step, or never started: there is nothing to contradict
    saved = validate(TrainSettings, load_yaml(run.config), str(run.config)).model_dump(mode="json")
    for name, value in settings.model_dump(mode="json").items():
        if name not in RESUMABLE_CHANGES and value != saved[name]:
            raise ValueError(
                f"--resume: {name} is {value!r}, but the run in {str(run.path)!r} has "
                f"{saved[name]!r}; resume with the same setting or give another --out"
            )


def set_up(job: Job) -> Trainer:
    """Join the other ranks, build model, optimizer and scheme, and load the checkpoint if any."""
    settings, world, device = job.settings, job.world, job.device
    torch.manual_seed(settings.seed + world.rank)  # dropout: different masks on each rank
    world.join(device)
    model = job.task.build().to(device)
    debug = commkit.Debug(**settings.debug.model_dump())
    try:
        wrapped, mesh = model, None
        if sharding.is_sharded(settings):
            mesh = sharding.shard(model, settings, world, device)
        else:
            wrapped = wrap(model, settings, device)
        optimizer = make_optimizer(model, settings, mesh)
        handle = baselines.attach(wrapped, optimizer, settings.scheme, mesh, debug)
    except (ValueError, TypeError, RuntimeError) as error:
        raise SetupError(str(error)) from error
    trainer = Trainer(
        settings=settings,
        model=wrapped,
        optimizer=optimizer,
        handle=handle,
        loader=job.task.loader(world.rank, world.size),
        task=job.task,
        device=device,
        run=job.run,
        sharded=ShardedReplicas(handle, mesh)
        if isinstance(handle, OuterSync) and mesh is not None
        else None,
        after_backward=getattr(handle, "backward_ended", None),
        meter=job.meter,
        expectation=job.expectation,
    )
    begin(trainer, job.resume)
    return trainer


def begin(trainer: Trainer, resume: bool) -> None:
    """Load the checkpoint if any; on rank 0 make the run's directory ready for records, and say what is about to run.

    Raises:
        SetupError: a checkpoint that does not fit, or a sink that cannot be opened.
    """
    if resume:
        try:
            trainer.load()
        except ValueError as error:
            raise SetupError(str(error)) from error
    if trainer.rank != 0:
        return
    settings = trainer.settings
    trainer.run.prepare(settings.model_dump(mode="json"), trainer.progress.step)
    try:
        trainer.sinks, trainer.validation_sinks = open_sinks(trainer.run, settings)
    except RuntimeError as error:
        raise SetupError(str(error)) from error
    print(describe(trainer), flush=True)


def elastic_run(job: Job) -> Callable[[], None]:
    """The run with workers that may be lost."""
    try:
        members = elastic.join(job)
    except ValueError as error:
        raise SetupError(str(error)) from error

    def run() -> None:
        with members:
            try:
                trainer = elastic.set_up(job, members)
            except (ValueError, TypeError, RuntimeError) as error:
                refuse(SetupError(str(error)))
            elastic.train(trainer)

    return run


def role_of(job: Job) -> Callable[[], None] | None:
    """What this rank has to do in a recipe whose ranks have roles; None if it has none."""
    try:
        scheme, has_coordinator = (
            asynchronous.scheme_of(job.settings),
            coordinated.concerns(job.settings),
        )
        if scheme is None and not has_coordinator:
            return None
        for name in (
            "checkpoint.asynchronous",
            "debug.check_replicas_every",
            "debug.wire_checksums",
        ):
            section, _, key = name.partition(".")
            if getattr(getattr(job.settings, section), key):
                raise ValueError(
                    f"{name} is not for schemes whose ranks have roles, such as {job.settings.scheme['name']!r}; leave it out"
                )
        if job.settings.max_seconds is not None:
            raise ValueError(
                f"max_seconds={job.settings.max_seconds:g}: a scheme whose ranks have roles, such as "
                f"{job.settings.scheme['name']!r}, ends by steps alone; leave it out and set steps"
            )
        return (
            coordinated.set_up(job).run
            if scheme is None
            else asynchronous.set_up(job, scheme).train
        )
    except (ValueError, TypeError, RuntimeError, ModuleNotFoundError) as error:
        raise SetupError(str(error)) from error


def wrap(model: torch.nn.Module, settings: TrainSettings, device: torch.device) -> torch.nn.Module:
    """In DDP, unless the scheme trains with local updates: then replicas are on their own."""
    if not baselines.is_baseline(settings.scheme):
        if isinstance(make_scheme(settings.scheme), OuterScheme):
            return model
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        **settings.ddp.model_dump(),
    )


def describe(trainer: Trainer) -> str:
    """One line: what is about to run."""
    return (
        f"{trainer.settings.scheme['name']}: {count_parameters(trainer.model):,} parameters, "
        f"{trainer.comm.world_size} ranks on {trainer.device.type}, "
        f"{trainer.task.headline()}, "
        f"step {trainer.progress.step} of {trainer.settings.steps}, into {trainer.run.path}"
    )


def train(trainer: Trainer) -> None:
    """Run to the end and write the summary."""
    validation = trainer.train(LauncherWatch())
    if trainer.rank == 0:
        print(trainer.run.write_summary(facts(trainer, validation)), flush=True)
        for sink in {*trainer.sinks, *trainer.validation_sinks}:
            sink.close()
    trainer.handle.close()
    dist.destroy_process_group()


def facts(trainer: Trainer, validation: Mapping[str, float]) -> dict[str, Any]:
    """What ``summary.json`` says besides the totals of the per-step records."""
    common = facts_of(
        trainer.settings,
        trainer.task,
        trainer.model,
        trainer.device,
        world_size=trainer.comm.world_size,
        steps=trainer.progress.step,
        seconds=trainer.progress.seconds,
        validation=validation,
    )
    return common | ({"auto": trainer.expectation.facts()} if trainer.expectation else {})


def refuse(error: SetupError) -> NoReturn:
    """Print one line, once for all ranks, and exit with status 2."""
    rank = World.from_environment().rank
    if rank != 0:
        time.sleep(PATIENCE_S)
    print(f"error on rank {rank}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    os._exit(2)  # not sys.exit: other ranks may be gone, and teardown would wait for them


if __name__ == "__main__":
    main()

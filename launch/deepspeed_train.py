"""The reference training program on DeepSpeed's engine.

    NPROC=2 launch/deepspeed.sh configs/deepspeed/onebit_adam.json --out runs/onebit

``--config`` is a ``ds_config``, which says what DeepSpeed and commkit do; model, data, schedule and the rest of a
run are those of ``launch/settings.py``, which ``--set`` changes. What is written is what ``launch/train.py`` writes.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: find `launch`

import torch
import tyro
from torch import Tensor

import commkit.deepspeed
from commkit.config import apply_overrides, load_yaml, validate
from launch import train
from launch.loop import Trainer
from launch.optimizer import decaying_groups
from launch.settings import TrainSettings
from launch.train import Arguments, Job, SetupError

# What a ds_config says itself, so that --set must not say it again.
_ELSEWHERE = ("scheme", "optim.name", "optim.weight_decay", "optim.betas", "optim.grad_clip")
_DS_CONFIG = "ds_config"


class EngineSteps:
    """The engine's optimizer as the loop knows optimizers. DeepSpeed clears gradients by itself."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

    def step(self) -> None:
        self._engine.step()

    def zero_grad(self) -> None:
        """Nothing to do."""


@dataclass
class EngineTrainer(Trainer):
    """The loop, with forward, backward, step and checkpoints of the engine, which is its ``model``."""

    def gradients(self, batches: Sequence[Tensor]) -> Tensor:
        """As in the loop without DeepSpeed. The engine counts micro-batches, all but the last here."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        engine: Any = self.model
        for number, batch in enumerate(batches):
            loss = self.task.loss(engine, batch.to(self.device))
            engine.backward(loss)
            if number < len(batches) - 1:
                engine.step()
            total += loss.detach() / len(batches)
        return total

    @property
    def forward_is_collective(self) -> bool:
        engine: Any = self.model
        return bool(engine.zero_optimization_partition_weights())

    def save_when_due(self) -> None:
        """Checkpoint at every multiple of ``checkpoint.every`` and at the last step."""
        step, every = self.progress.step, self.settings.checkpoint.every
        if not (self.ended or (every and step % every == 0)):
            return
        own = self.random_state.state_dict()
        beside = {
            "progress": self.progress.state_dict(),
            "random_states": self.comm.all_gather_object(own),
        }
        engine: Any = self.model
        tag = self.run.checkpoint(step).name
        engine.save_checkpoint(str(self.run.checkpoints), tag=tag, client_state=beside)
        if self.rank == 0:
            self.run.prune_checkpoints()

    def load(self) -> None:
        """Continue from the newest complete checkpoint of the run, or from the start."""
        engine: Any = self.model
        if not (self.run.checkpoints / "latest").is_file():
            return
        _, beside = engine.load_checkpoint(str(self.run.checkpoints))
        self.progress.load_state_dict(beside["progress"])
        states = beside["random_states"]
        if len(states) == self.comm.world_size:
            self.random_state.load_state_dict(states[self.rank])


def main(words: Sequence[str] | None = None) -> None:
    """Run the program; ``words`` are its arguments, the command line's if not given."""
    warnings.filterwarnings(
        "ignore", message="'set_vital' is deprecated"
    )  # torchdata on torch 2.13
    arguments = tyro.cli(
        Arguments, args=words, description="Train the reference model on DeepSpeed's engine."
    )
    try:
        trainer = set_up(train.prepare(arguments, read_settings))
    except SetupError as error:
        train.refuse(error)
    train.train(trainer)


def read_settings(arguments: Arguments) -> TrainSettings:
    """A run's settings around the ``ds_config``, which is kept in them.

    Raises:
        ValueError: an override of what the ``ds_config`` says, or something wrong in either; ``--scheme``.
    """
    for override in arguments.overrides:
        name = override.partition("=")[0]
        if name.startswith(_ELSEWHERE):
            raise ValueError(
                f"--set {name}: that is for {str(arguments.config)!r} to say; change it there"
            )
    if arguments.scheme is not None:
        raise ValueError(
            f"--scheme {arguments.scheme}: the ds_config says what the scheme is; leave the option out"
        )
    ds_config = load_yaml(arguments.config)
    if "scheduler" in ds_config:
        raise ValueError(
            f"{arguments.config}: scheduler: this program sets the learning rate itself; leave it out, and see "
            "--set schedule.warmup, schedule.length and schedule.min_lr"
        )
    said: dict[str, Any] = {
        "scheme": {"name": arguments.config.stem, _DS_CONFIG: ds_config},
        "batch": {
            "per_rank": ds_config.get("train_micro_batch_size_per_gpu"),
            "accumulate": ds_config.get("gradient_accumulation_steps", 1),
        },
    }
    block = ds_config.get("commkit", {})
    optimizer = ds_config.get("optimizer", {}).get("params", {}) or block.get("optimizer", {})
    if "lr" in optimizer:
        said["optim"] = {"lr": optimizer["lr"]}
        said["schedule"] = {"min_lr": optimizer["lr"] / 10}
    overrides = list(arguments.overrides)
    if arguments.steps is not None:
        overrides.append(f"steps={arguments.steps}")
    return validate(TrainSettings, apply_overrides(said, overrides), str(arguments.config))


def set_up(job: Job) -> EngineTrainer:
    """Join the other ranks, build model and engine, and load the checkpoint if any."""
    settings, world = job.settings, job.world
    if job.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in {
        "RANK": world.rank,
        "LOCAL_RANK": world.local_rank,
        "WORLD_SIZE": world.size,
    }.items():
        os.environ.setdefault(name, str(value))
    torch.manual_seed(settings.seed + world.rank)  # dropout: different masks on each rank
    world.join(job.device)
    model = job.task.build().to(job.device)
    try:
        engine, *_ = commkit.deepspeed.initialize(
            model=model,
            model_parameters=decaying_groups(model),
            config=settings.scheme[_DS_CONFIG],
        )
        handle = getattr(engine, "commkit", None)
        if handle is None:
            raise ValueError(
                'the ds_config asks nothing of commkit; give it a block "commkit", such as {"scheme": "ddp"}'
            )
    except (ValueError, TypeError, RuntimeError, AssertionError, ModuleNotFoundError) as error:
        raise SetupError(str(error)) from error
    trainer = EngineTrainer(
        settings=settings,
        model=engine,
        optimizer=EngineSteps(engine),  # type: ignore[arg-type]
        handle=handle,
        loader=job.task.loader(world.rank, world.size),
        task=job.task,
        device=job.device,
        run=job.run,
        meter=job.meter,
    )
    train.begin(trainer, job.resume)
    return trainer


if __name__ == "__main__":
    main()

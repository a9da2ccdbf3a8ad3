"""Train the reference model twice with two processes, plain DDP and compressed, and compare.

    python launch/quickstart.py [--steps N] [--set a.b=c ...]

This is what ``make train`` runs. Files: ``runs/quickstart/NAME/``, ``report.md`` and ``loss.png``.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: find `launch`

import tyro

from launch.report import plot, read_run, table

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("ddp", "powersgd")  # the first is what the others are compared with


@dataclass(frozen=True)
class Arguments:
    """Train with plain DDP and with PowerSGD, same seed and data, and compare."""

    overrides: Annotated[
        tuple[str, ...],
        tyro.conf.arg(name="set", metavar="A.B=VALUE"),
        tyro.conf.UseAppendAction,
    ] = ()
    """Replace one field in both recipes; VALUE is read as YAML. May be given many times."""
    steps: int | None = None
    """Steps of each run."""
    out: Path = Path("runs/quickstart")
    """Where to write; what an earlier quick start wrote there is removed."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    runs = [arguments.out / name for name in RECIPES]
    for name, run in zip(RECIPES, runs, strict=True):
        shutil.rmtree(run, ignore_errors=True)
        status = subprocess.run(command(name, run, arguments), env=environment()).returncode
        if status:
            sys.exit(f"error: the run {name} failed with status {status}; its output is above")
    finished = [read_run(run) for run in runs]
    text = table(finished)
    report = arguments.out / "report.md"
    picture = arguments.out / "loss.png"
    plot(finished, picture)
    report.write_text(f"# Quick start\n\n{text}\n\n![loss]({picture.name})\n", encoding="utf-8")
    print(f"\n{text}\n\nLosses are nats per byte; bytes and times are rank 0's, times are medians.")
    print(f"Written: {report}, {picture}")


def command(name: str, run: Path, arguments: Arguments) -> list[str]:
    """The command line of one run."""
    words = ["bash", str(ROOT / "launch" / "torchrun.sh"), str(ROOT / "launch" / "train.py")]
    words += ["--config", str(ROOT / "configs" / f"{name}.yaml"), "--out", str(run)]
    if arguments.steps is not None:
        words += ["--steps", str(arguments.steps)]
    for override in arguments.overrides:
        words += ["--set", override]
    return words


def environment() -> dict[str, str]:
    """This process's environment, with two ranks on this machine and this interpreter."""
    return {**os.environ, "NPROC": "2", "NNODES": "1", "PYTHON": sys.executable}


if __name__ == "__main__":
    main()

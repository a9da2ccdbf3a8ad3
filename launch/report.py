"""Reads what runs have written and compares them: a table in Markdown and a plot."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from launch.rundir import RunDirectory, read_records
from launch.tables import markdown_table

_HEADER = (
    "run",
    "loss",
    "validation loss",
    "MB on the wire per step",
    "MB on the wire in all",
    "step time [ms]",
    "exposed communication [ms]",
)


@dataclass(frozen=True)
class Run:
    """One finished run."""

    name: str
    summary: dict[str, Any]
    records: list[dict[str, Any]]  # lines of metrics.jsonl

    @property
    def wire_bytes_per_step(self) -> float | None:
        """None where nobody counted: torch's own hooks."""
        total: int | None = self.summary["total_wire_bytes"]
        return None if total is None else total / max(1, len(self.records))


def read_run(directory: Path) -> Run:
    """Read a directory that ``launch/train.py`` has written; its last part is the run's name.

    Raises:
        ValueError: the run has not finished.
    """
    files = RunDirectory(directory)
    if not files.summary.is_file():
        raise ValueError(
            f"run: {str(directory)!r} has no summary.json, which a run writes when it ends; "
            "finish it with --resume"
        )
    summary = json.loads(files.summary.read_text(encoding="utf-8"))
    return Run(directory.name, summary, read_records(files.metrics))


def table(runs: Sequence[Run]) -> str:
    """A Markdown table, one row a run; the last columns are ratios to the first run.

    Losses are in nats per byte, bytes and times those of rank 0, times medians over the steps.
    """
    baseline = runs[0]
    header = [*_HEADER, f"bytes / {baseline.name}", f"step time / {baseline.name}"]
    return markdown_table([header, *(_row(run, baseline) for run in runs)])


def plot(runs: Sequence[Run], path: Path) -> None:
    """Draw training loss against steps and against bytes sent by rank 0; the suffix is the format.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the plot needs matplotlib; pip install 'commkit[report]'"
        ) from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)  # no display needed
    by_step, by_bytes = figure.subplots(1, 2, sharey=True)
    for run in runs:
        points = [record for record in run.records if record["loss"] is not None]
        losses = [record["loss"] for record in points]
        label = f"{run.name} (validation {_number(run.summary['val_loss'], '.3f')})"
        by_step.plot([record["step"] for record in points], losses, label=label, linewidth=1)
        if run.wire_bytes_per_step is not None:
            megabytes = [total / 1e6 for total in accumulate(r["wire_bytes"] for r in points)]
            by_bytes.plot(megabytes, losses, linewidth=1)
    by_step.set(xlabel="step", ylabel="training loss [nats per byte]")
    by_bytes.set(xlabel="sent by rank 0 [MB]")
    if any(run.summary["total_wire_bytes"] for run in runs):
        by_bytes.set_xscale("log")
    by_step.legend()
    for axes in (by_step, by_bytes):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _row(run: Run, baseline: Run) -> list[str]:
    summary = run.summary
    step, exposed = summary["median_step_seconds"], summary["median_exposed_comm_seconds"]
    sent, total = run.wire_bytes_per_step, summary["total_wire_bytes"]
    return [
        run.name,
        _number(summary["train_loss"], ".3f"),
        _number(summary["val_loss"], ".3f"),
        _number(sent and sent / 1e6, ".3f"),
        _number(total and total / 1e6, ".1f"),
        _number(step and step * 1e3, ".1f"),
        _number(exposed and exposed * 1e3, ".1f"),
        _ratio(sent, baseline.wire_bytes_per_step),
        _ratio(step, baseline.summary["median_step_seconds"]),
    ]


def _ratio(value: float | None, reference: float | None) -> str:
    return "-" if value is None or not reference else f"{value / reference:.3f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)

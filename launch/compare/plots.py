"""Pictures of a comparison."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.compare.analyse import Row
from launch.compare.plan import NOOP


def draw(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Write ``loss.png`` and ``time.png``; returns what was written.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    finished = [row for row in rows if row.finished]
    if not finished:
        return []
    return [_losses(finished, directory / "loss.png"), _times(finished, directory / "time.png")]


def _losses(rows: Sequence[Row], path: Path) -> Path:
    """Validation loss against steps, bytes and training time. The bound has none worth showing."""
    rows = [row for row in rows if row.name != NOOP]
    figure = _figure(15, 4.5)
    by_step, by_bytes, by_time = figure.subplots(1, 3, sharey=True)
    counted = all(p.tx_bytes is not None for row in rows for p in row.curve)
    for row in rows:
        points = [point for point in row.curve if point.val_loss is not None]
        losses = [point.val_loss for point in points]
        style = {"marker": ".", "linewidth": 1}
        (line,) = by_step.plot([point.step for point in points], losses, label=row.name, **style)
        by_time.plot([point.seconds for point in points], losses, color=line.get_color(), **style)
        sent = [point.tx_bytes if counted else point.wire_bytes for point in points]
        if all(sent):  # torch's own hooks count nothing
            megabytes = [(total or 0) / 1e6 for total in sent]
            by_bytes.plot(megabytes, losses, color=line.get_color(), **style)
    source = "by a node's interface" if counted else "by rank 0, as commkit counts"
    by_step.set(xlabel="step", ylabel="validation loss")
    by_bytes.set(xlabel=f"sent {source} [MB]", xscale="log")
    by_time.set(xlabel="training time [s]", xscale="log")
    by_step.legend()
    for axes in (by_step, by_bytes, by_time):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path


def _times(rows: Sequence[Row], path: Path) -> Path:
    """Step time, split into compute and exposed communication, with the compression beside it."""
    figure = _figure(9, 0.6 * len(rows) + 1.5)
    axes = figure.subplots()
    names = [row.name for row in rows]
    compute = [_milliseconds(row, "compute_seconds") for row in rows]
    exposed = [_milliseconds(row, "exposed_comm_seconds") for row in rows]
    compression = [_milliseconds(row, "compression_seconds") for row in rows]
    places = range(len(rows))
    axes.barh(places, compute, 0.45, label="compute")
    axes.barh(places, exposed, 0.45, left=compute, label="exposed communication and compression")
    beside = [place + 0.33 for place in places]
    axes.barh(beside, compression, 0.15, label="compression, hidden or not")
    axes.set_yticks(list(places), names)
    axes.invert_yaxis()
    axes.set(xlabel="step time on rank 0 [ms]")
    axes.grid(alpha=0.3, axis="x")
    axes.legend()
    figure.savefig(path, dpi=120)
    return path


def draw_beside(
    names: Sequence[str],
    simulated: Sequence[float],
    measured: Sequence[float | None],
    path: Path,
) -> None:
    """Seconds per step of each method, simulated and measured, one above the other.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    figure = _figure(9, 0.6 * len(names) + 1.5)
    axes = figure.subplots()
    places = range(len(names))
    axes.barh([p - 0.2 for p in places], simulated, 0.38, label="simulated")
    axes.barh([p + 0.2 for p in places], [s or 0.0 for s in measured], 0.38, label="measured")
    axes.set_yticks(list(places), list(names))
    axes.invert_yaxis()
    axes.set(xlabel="seconds per step")
    axes.grid(alpha=0.3, axis="x")
    axes.legend()
    figure.savefig(path, dpi=120)


def _milliseconds(row: Row, name: str) -> float:
    return (row.middle(name) or 0.0) * 1e3


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the plots need matplotlib; pip install 'commkit[report]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no display needed
    return figure

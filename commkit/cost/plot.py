"""A picture of a simulation. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .simulate import Outcome


def draw(title: str, outcomes: Sequence[Outcome], path: Path) -> None:
    """Step time split into computing and idling, and bytes, of each method.

    Raises:
        ValueError, OSError: matplotlib knows no such format, or the file cannot be written.
    """
    figure = Figure(figsize=(10, 0.5 * len(outcomes) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)  # no display needed
    time, sent = figure.subplots(1, 2, sharey=True)
    names = [f"{o.scheme}, H={o.sync_every}" if o.sync_every > 1 else o.scheme for o in outcomes]
    busy = [o.step_s * o.goodput for o in outcomes]
    time.barh(names, busy, label="computing")
    time.barh(names, [o.step_s * o.idle_share for o in outcomes], left=busy, label="idle")
    time.set(xlabel="seconds per step", title=title)
    time.legend()
    sent.barh(names, [o.bytes_per_step / 1e6 for o in outcomes])
    sent.set(xlabel="MB that a worker sends per step", xscale="log")
    time.invert_yaxis()
    for axes in (time, sent):
        axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)

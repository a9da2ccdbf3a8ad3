"""Ranks with data of their own: how near descent comes to the common optimum behind top-k.

Each rank has a quadratic of its own, with a minimum far from the others', so that no rank's gradient is zero
where their mean is. Plain error feedback never empties its residuals there and circles at a distance that
only smaller steps reduce; EF21 and EControl send differences to an estimate, which vanish. With noise, as
from small batches, EF21 without momentum has no average over time that would remove it from the estimate.
Ranks are threads; steps and noise are the same for all schemes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import harness  # noqa: F401  (puts the repository on sys.path)
import torch
from report import Result, Target, main

from commkit.schemes import make_reducer
from commkit.sim import ThreadComm, run_threads

RANKS, SIZE, DENSITY, LR, SPREAD = 4, 64, 0.1, 0.3, 10.0
NOISES = {"full gradients": 0.0, "small batches": 5.0}
_COMMON = {"density": DENSITY, "min_numel": 0}
SCHEMES: dict[str, dict[str, Any]] = {
    "all-reduce": {"name": "ddp"},
    "top-k, plain error feedback": {"name": "topk", **_COMMON},
    "EF21": {"name": "ef21", **_COMMON},
    "EF21-SGDM": {"name": "ef21", "momentum": 0.1, **_COMMON},
    "EControl": {"name": "econtrol", **_COMMON},
}


class Problem:
    """f_i(x) = (x - b_i)' A_i (x - b_i) / 2, the eigenvalues of A_i from 0.1 to 1, b_i of size SPREAD."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        values = torch.logspace(-1, 0, SIZE, dtype=torch.float64).diag()
        self.curvatures, self.minima = [], []
        for _ in range(RANKS):
            square = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
            basis, _ = torch.linalg.qr(square)
            self.curvatures.append(basis @ values @ basis.T)
            self.minima.append(SPREAD * torch.randn(SIZE, generator=generator, dtype=torch.float64))
        pulls = [a @ b for a, b in zip(self.curvatures, self.minima, strict=True)]
        self.optimum = torch.linalg.solve(sum(self.curvatures), sum(pulls))

    def gradient(self, rank: int, x: torch.Tensor) -> torch.Tensor:
        return self.curvatures[rank] @ (x - self.minima[rank])


def descend(problem: Problem, block: dict[str, Any], noise: float, steps: int) -> list[float]:
    """Distance to the optimum after each step; 1 is that of the start, 0."""

    def body(comm: ThreadComm) -> list[float]:
        generator = torch.Generator().manual_seed(comm.rank)
        x, reducer, distances = torch.zeros(SIZE, dtype=torch.float64), make_reducer(block), []
        for _ in range(steps):
            own = problem.gradient(comm.rank, x)
            own += noise * torch.randn(SIZE, generator=generator, dtype=torch.float64)
            x = x - LR * reducer.reduce({"x": own}, comm)["x"]
            reducer.end_step()
            distances.append(float((x - problem.optimum).norm() / problem.optimum.norm()))
        return distances

    return run_threads(body, RANKS)[0]


def measure(options: argparse.Namespace) -> Result:
    problem, steps = Problem(), 60 if options.quick else 600
    curves = {
        (what, name): descend(problem, block, noise, steps)
        for what, noise in NOISES.items()
        for name, block in SCHEMES.items()
    }
    ends = {key: sum(curve[-20:]) / 20 for key, curve in curves.items()}
    result = Result(
        "heterogeneous",
        {"ranks": RANKS, "size": SIZE, "density": DENSITY, "lr": LR, "steps": steps},
    )
    result.tables["distance to the optimum, mean of the last 20 steps (start: 1)"] = [
        {"scheme": name, **{what: ends[what, name] for what in NOISES}} for name in SCHEMES
    ]
    exact = {name: ends["full gradients", name] for name in SCHEMES}
    plain = exact["top-k, plain error feedback"]
    for name in ("EF21", "EControl"):
        ratio = exact[name] / plain
        result.targets.append(Target.at_most(f"{name} / plain error feedback", 0.01, ratio))
    if options.plot is not None:
        _plot(curves, options.plot)
    return result


def _plot(curves: dict[tuple[str, str], list[float]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, what in zip(figure.subplots(1, len(NOISES), sharey=True), NOISES, strict=True):
        for name in SCHEMES:
            axes.plot(curves[what, name], label=name, linewidth=1)
        axes.set(title=what, xlabel="step", ylabel="distance to the optimum", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(
        __doc__,
        measure,
        lambda parser: parser.add_argument("--plot", type=Path, metavar="FILE", help="curves"),
    )

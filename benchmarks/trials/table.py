"""The convergence table: each system against dense training, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from trials.density import real_density
from trials.execute import FAILED, FINISHED, MISSING
from trials.plan import SEEDS, Trial
from trials.systems import DENSE, System
from trials.tasks import TASKS

WITHIN_SPREAD, WITHIN_ONE, MISSES = "within spread", "within 1 %", "misses"
TOLERANCE = 0.01  # of the loss, or points of accuracy
_NOTE_LENGTH = 160

LEGEND = """\
loss and accuracy on validation data: mean over seeds +- their standard deviation
dense is training with the same optimizer, learning rate, steps, data and ranks, gradients averaged in fp32; its \
learning rate was tuned once and is every system's, unless the note says otherwise
'worse by' is the mean over seeds of the difference to dense of the same seed, of the loss in % or of the accuracy \
in points; 'spreads' is the same in standard deviations of dense over seeds (of accuracy at least one image)
verdict: at most one spread worse than dense, else at most 1 % (1 point), else misses; three seeds say little \
about a spread
kB and MB are sent by one rank; 'late' is the last quarter of the run, after the dense start of some systems\
""".splitlines()


@dataclass(frozen=True)
class Done:
    """A trial and its result, if it was run."""

    trial: Trial
    result: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        return bool(self.result["status"] == FINISHED)

    def value(self, figure: str) -> float:
        """Of a finished run; not finite if the run diverged."""
        value = self.result[figure]
        return math.nan if value is None else float(value)


def tables(done: Sequence[Done]) -> dict[str, list[dict[str, Any]]]:
    """One table for each task and number of ranks; rows in the order of the systems."""
    groups = dict.fromkeys((d.trial.task, d.trial.ranks) for d in done)
    return {
        f"{task}, {ranks} ranks": rows(
            [d for d in done if (d.trial.task, d.trial.ranks) == (task, ranks)]
        )
        for task, ranks in sorted(groups, key=lambda group: (list(TASKS).index(group[0]), group[1]))
    }


def rows(done: Sequence[Done]) -> list[dict[str, Any]]:
    """The rows of one task and number of ranks."""
    systems = dict.fromkeys(d.trial.system.name for d in done)
    by_name = {name: [d for d in done if d.trial.system.name == name] for name in systems}
    return [row(mine, by_name) for mine in by_name.values()]


def row(mine: Sequence[Done], by_name: Mapping[str, Sequence[Done]]) -> dict[str, Any]:
    """One system's line."""
    task, system = mine[0].trial.task, mine[0].trial.system
    inner = system.inner_of(task)
    finished = [d for d in mine if d.finished]
    reference = [d for d in by_name.get(f"{DENSE}{inner}", ()) if d.finished]
    line: dict[str, Any] = {"system": system.name, "optimizer": inner}
    line["loss"] = _mean_and_spread(finished, "val_loss", 4)
    if TASKS[task].figure == "val_accuracy":
        line["accuracy %"] = _mean_and_spread(finished, "val_accuracy", 2, 100)
    line |= {"worse by": "", "spreads": ""}
    if system.name.startswith(DENSE):
        line["verdict"] = "" if finished else _why_not(mine)
    else:
        line |= judge(finished, reference) if finished else {"verdict": _why_not(mine)}
    line |= _bytes(finished, reference)
    line["note"] = note(system, mine)
    return line


def judge(finished: Sequence[Done], reference: Sequence[Done]) -> dict[str, Any]:
    """Difference to dense, paired by seed: equal seeds see the same data from the same weights."""
    dense = {d.trial.seed: d for d in reference}
    pairs = [(d, dense[d.trial.seed]) for d in finished if d.trial.seed in dense]
    if not pairs:
        return {"verdict": "no dense run"}
    figure = TASKS[finished[0].trial.task].figure
    higher_is_better = figure == "val_accuracy"
    sign = -1.0 if higher_is_better else 1.0
    worse = fmean(sign * (own.value(figure) - other.value(figure)) for own, other in pairs)
    scale = 1.0 if higher_is_better else fmean(other.value(figure) for _, other in pairs)
    if not math.isfinite(worse):
        return {"verdict": f"{MISSES}: diverged"}
    unit = spread_of_dense(reference)
    line = {
        "worse by": f"{100 * worse / scale:+.2f}{' points' if higher_is_better else ' %'}",
        "spreads": "" if unit is None else f"{worse / unit:+.1f}",
    }
    if unit is not None and worse <= unit:
        return line | {"verdict": WITHIN_SPREAD}
    return line | {"verdict": WITHIN_ONE if worse <= TOLERANCE * scale else MISSES}


def spread_of_dense(reference: Sequence[Done]) -> float | None:
    """Standard deviation over seeds; None of fewer than two."""
    if len(reference) < 2:
        return None
    figure = TASKS[reference[0].trial.task].figure
    spread: float = stdev(d.value(figure) for d in reference)
    if figure == "val_accuracy":
        images: int = reference[0].result["data"]["validation_images"]
        return max(spread, 1 / images)
    return spread


def note(system: System, mine: Sequence[Done]) -> str:
    """What a reader should know: of the system, of failures, of seeds that are missing."""
    parts = [system.note] if system.note else []
    lr = system.lr.get(mine[0].trial.task)
    if lr:
        parts.append(f"lr {lr:g}")
    finished = sum(d.finished for d in mine)
    if "density" in system.scheme and finished:
        share = real_density(mine[0].trial.task, system.scheme["density"])
        parts.append(f"sends {100 * share:.2g} % of compressed elements")
    if len(mine) < SEEDS:
        parts.append(f"{len(mine)} of {SEEDS} seeds")
    failed = [d for d in mine if d.result["status"] == FAILED]
    if failed and finished:
        parts.append(f"{len(failed)} of {len(mine)} seeds failed")
    parts += dict.fromkeys(" ".join(d.result["error"].split())[:_NOTE_LENGTH] for d in failed)
    return "; ".join(parts).replace("|", "/")


def _why_not(mine: Sequence[Done]) -> str:
    return MISSING if all(d.result["status"] == MISSING for d in mine) else FAILED


def _mean_and_spread(done: Sequence[Done], figure: str, digits: int, times: float = 1.0) -> str:
    values = [times * d.value(figure) for d in done]
    if not values:
        return ""
    spread = f" +- {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


def _bytes(finished: Sequence[Done], reference: Sequence[Done]) -> dict[str, Any]:
    """Sent per step and over the run, and how many times more dense training sends."""
    columns = ("kB/step", "MB/run", "x fewer", "late kB/step", "x fewer late")
    known = [d for d in finished if d.result["wire_bytes"] is not None]
    if not known:
        return dict.fromkeys(columns, "")
    run = fmean(d.result["wire_bytes"] for d in known)
    steps = known[0].result["steps"]
    late = fmean(d.result["late_wire_bytes_per_step"] for d in known)
    dense = fmean(d.result["wire_bytes"] for d in reference) if reference else math.nan
    values = (run / steps / 1e3, run / 1e6, _ratio(dense, run), late / 1e3)
    figures = (*values, _ratio(dense / steps, late))
    return {
        name: "" if math.isnan(figure) else f"{figure:.4g}"
        for name, figure in zip(columns, figures, strict=True)
    }


def _ratio(dense: float, own: float) -> float:
    return dense / own if own else math.inf

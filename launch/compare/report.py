"""Writes a comparison down: ``compare.json``, ``compare.md`` and the pictures."""

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import commkit
from launch.compare.analyse import TOLERANCE, Row, Run, Spread
from launch.compare.plan import DDP, NOOP, ROOT
from launch.compare.plots import draw
from launch.rundir import write_atomically
from launch.tables import markdown_table


@dataclass(frozen=True)
class Setting:
    """What was compared where.

    Args:
        network: the lab's own words.
        link: as asked for; ``none`` is loopback.
        nodes: hosts.
        ranks_per_node: processes on each.
        steps: of each run.
        seconds: of training after which runs ended before their steps; None: no limit.
        seeds: how many.
        rounds: how often each seed ran.
        overrides: fields replaced in every recipe.
        interrupted: the comparison was stopped before its end.
    """

    network: str
    link: str
    nodes: int
    ranks_per_node: int
    steps: int
    seeds: int
    rounds: int
    overrides: tuple[str, ...]
    seconds: float | None = None
    interrupted: bool = False


def write(rows: Sequence[Row], setting: Setting, out: Path) -> str:
    """Write all files into ``out``; returns the text of ``compare.md``."""
    out.mkdir(parents=True, exist_ok=True)
    data = {
        "setting": asdict(setting),
        "machine": machine(),
        "configurations": [_plain(row) for row in rows],
    }
    write_atomically(out / "compare.json", json.dumps(data, indent=2) + "\n")
    pictures = draw(rows, out)
    text = markdown(rows, setting)
    images = "".join(f"\n![{path.stem}]({path.name})\n" for path in pictures)
    write_atomically(out / "compare.md", text + images)
    return text


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commkit": commkit.__version__,
    }


def markdown(rows: Sequence[Row], setting: Setting) -> str:
    """The table, how to read it, and what went wrong."""
    parts = ["# Comparison", _headline(setting), table(rows), _legend(rows), _load(rows)]
    parts.append(_reconciliation(rows, setting))
    failures = [row for row in rows if row.errors]
    if failures:
        lines = [
            f"- `{row.name}`: {len(row.runs) - row.finished} of {len(row.runs)} runs: {error}"
            for row in failures
            for error in row.errors
        ]
        parts.append("## Did not finish\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Row]) -> str:
    """Markdown, one row a configuration. A column that nobody has a value for is left out."""
    columns = [column for column in _columns() if any(column[1](row) != "-" for row in rows)]
    cells = [[title for title, _ in columns], *([cell(row) for _, cell in columns] for row in rows)]
    return markdown_table(cells)


def _columns() -> list[tuple[str, Callable[[Row], str]]]:
    def value(name: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
        return lambda row: _number(row.middle(name), form, scale)

    return [
        ("configuration", lambda row: row.name),
        ("runs", lambda row: f"{row.finished}/{len(row.runs)}"),
        ("step [ms]", value("step_seconds", ".1f", 1e3)),
        ("steps", value("steps", ".0f")),
        (f"step / {DDP}", lambda row: _spread(row.to_ddp)),
        (f"step / {NOOP}", lambda row: _spread(row.to_noop)),
        ("compute [ms]", value("compute_seconds", ".1f", 1e3)),
        ("exposed [ms]", value("exposed_comm_seconds", ".1f", 1e3)),
        ("comm. [ms]", value("comm_seconds", ".1f", 1e3)),
        ("compression [ms]", value("compression_seconds", ".1f", 1e3)),
        ("wire [MB/step]", value("wire_bytes", ".3f", 1e-6)),
        ("interface [MB/step]", value("tx_bytes", ".3f", 1e-6)),
        ("interface / wire", value("interface_ratio", ".3f")),
        ("without headers", value("payload_ratio", ".3f")),
        ("train loss", value("train_loss", ".3f")),
        ("validation loss", value("val_loss", ".3f")),
        ("accuracy", value("val_accuracy", ".3f")),
    ]


def _headline(setting: Setting) -> str:
    limit = "" if setting.seconds is None else f" or {setting.seconds:g} s of training"
    text = (
        f"{setting.network[0].upper()}{setting.network[1:]}; {setting.ranks_per_node} rank(s) on "
        f"each; {setting.steps} steps{limit}, {setting.seeds} seed(s), {setting.rounds} round(s)."
    )
    if setting.overrides:
        text += " Set for all: " + ", ".join(f"`{item}`" for item in setting.overrides) + "."
    if setting.interrupted:
        text += " **Interrupted**: only what had finished by then is here."
    return text


def _legend(rows: Sequence[Row]) -> str:
    text = (
        "Times are medians over the steps of rank 0 (means, also in ratios, of schemes that send in some steps "
        "only), then over the runs; ratios are taken between "
        "runs of the same seed and round, as median [lowest..highest]. A step is compute and "
        "exposed: what backward did not hide of communication and compression. Those two themselves "
        "are whole, hidden or not. Bytes are those that one rank or one interface sends; interfaces "
        f"count headers and acknowledgements too, about 6 %. `{NOOP}` sends no gradients: it is the bound on "
        "speed, and its loss means nothing."
    )
    if any(row.finished and row.middle("wire_bytes") is None for row in rows):
        text += " Torch's own hooks (`torch:...`) count no bytes; the interface does."
    return text


def _load(rows: Sequence[Row]) -> str:
    loads = [run.outcome.load for row in rows for run in row.runs]
    return (
        f"The machine's load average before the runs was {min(loads):.1f} to {max(loads):.1f} on "
        f"{len(os.sched_getaffinity(0))} cores, the runs' own load of a minute before included; "
        "where it varied much, look at ratios of more seeds or rounds."
    )


def _reconciliation(rows: Sequence[Row], setting: Setting) -> str:
    if setting.link == "none":
        return "**No link was emulated and no interface counted bytes** (`--link none`)."
    if setting.ranks_per_node > 1:
        return (
            "Bytes were not reconciled: part of the traffic stays inside a node of several ranks."
        )
    known = {row.name: ratio for row in rows if (ratio := row.middle("payload_ratio"))}
    off = {name: ratio for name, ratio in known.items() if abs(ratio - 1) > TOLERANCE}
    if off:
        listed = ", ".join(f"`{name}` {ratio:.3f}" for name, ratio in off.items())
        return (
            f"**Bytes differ by more than {TOLERANCE:.0%}**: what the interfaces sent without "
            f"headers, over wire_bytes, is {listed}."
        )
    if not known:
        return "There are no bytes to reconcile."
    return (
        "Bytes reconcile: what the interfaces sent without headers is within "
        f"{TOLERANCE:.0%} of wire_bytes for all."
    )


def _plain(row: Row) -> dict[str, Any]:
    ratio = row.middle("payload_ratio")
    return {
        "name": row.name,
        "finished": row.finished,
        "errors": row.errors,
        "figures": {key: _as_dict(value) for key, value in row.values.items()},
        f"step_to_{DDP}": _as_dict(row.to_ddp),
        f"step_to_{NOOP}": _as_dict(row.to_noop),
        "bytes_reconcile": None if ratio is None else abs(ratio - 1) <= TOLERANCE,
        "curve": [asdict(point) for point in row.curve],
        "runs": [_plain_run(run) for run in row.runs],
    }


def _plain_run(run: Run) -> dict[str, Any]:
    trial = run.outcome.trial
    return {
        "recipe": _portable(trial.configuration.recipe),
        "overrides": list(trial.configuration.overrides),
        "seed": trial.seed,
        "round": trial.round,
        "directory": str(Path(trial.directory.parent.name, trial.directory.name)),
        "status": run.outcome.status,
        "error": run.outcome.error,
        "seconds": run.outcome.seconds,
        "link_bytes": run.outcome.link_bytes,
        "load": run.outcome.load,
        "figures": None if run.figures is None else asdict(run.figures),
    }


def _portable(recipe: Path) -> str:
    """Without what only this machine knows."""
    return str(recipe.relative_to(ROOT)) if recipe.is_relative_to(ROOT) else recipe.name


def _as_dict(spread: Spread | None) -> dict[str, Any] | None:
    return None if spread is None else asdict(spread)


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    if spread.count == 1:
        return f"{spread.median:.3f}"
    return f"{spread.median:.3f} [{spread.low:.3f}..{spread.high:.3f}]"

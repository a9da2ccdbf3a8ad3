"""What a benchmark says: a table on the terminal, targets reached or missed, and a JSON file."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness import ROOT

import commkit


@dataclass(frozen=True)
class Target:
    """A figure to reach. ``limit`` is an upper bound, or None when ``reached`` is all there is to say."""

    what: str
    limit: float | None
    measured: float | str
    reached: bool

    @classmethod
    def at_most(cls, what: str, limit: float, measured: float) -> Target:
        return cls(what, limit, round(measured, 5), measured <= limit)


@dataclass
class Result:
    """What one program measured: tables by title, targets, remarks."""

    benchmark: str
    settings: dict[str, Any]
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def show(self) -> None:
        print(f"# {self.benchmark}: {json.dumps(self.settings)}")
        for title, rows in self.tables.items():
            print(f"\n{title}\n")
            print(table(rows))
        for note in self.notes:
            print(f"\nnote: {note}")
        if self.targets:
            print(f"\n{table(target_rows(self.targets))}")


def target_rows(targets: Sequence[Target]) -> list[dict[str, Any]]:
    return [
        {
            "figure": t.what,
            "target": "yes" if t.limit is None else f"<= {t.limit:g}",
            "measured": t.measured,
            "reached": "yes" if t.reached else "NO",
        }
        for t in targets
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, columns aligned. Columns are the union of the rows' keys, in order of appearance."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(head, "")) for head in heads] for row in rows]
    widths = [max(len(c[i]) for c in [heads, *cells]) for i in range(len(heads))]
    lines = [heads, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def environment() -> dict[str, Any]:
    """When, with what and on what kind of machine; nothing that names it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commkit": commkit.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{cores} cores, {gpu}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


def _commit() -> str | None:
    """The commit at work, with ``+`` if the library differs from it; None outside a git checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "commkit", "launch")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_markdown(result: Result, file: Path) -> None:
    """Tables, targets and notes, with when and where they were made."""
    facts = environment()
    where = ", ".join(f"{k} {facts[k]}" for k in ("torch", "commkit", "commit", "python"))
    lines = [f"# {result.benchmark}", f"{facts['date']}, {facts['machine']}, {where}"]
    for title, rows in result.tables.items():
        lines += [f"## {title}", table(rows)]
    lines += ["\n".join(f"- {note}" for note in result.notes)] if result.notes else []
    lines += [table(target_rows(result.targets))] if result.targets else []
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n\n".join(lines) + "\n")


def main(
    doc: str | None,
    measure: Callable[[argparse.Namespace], Result],
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="and its tables there")
    parser.add_argument("--quick", action="store_true", help="a few steps: does it run?")
    add_options(parser)
    options = parser.parse_args()
    before = environment()
    result = measure(options)
    result.settings["quick"] = options.quick
    result.show()
    if options.markdown:
        write_markdown(result, options.markdown)
    if options.json:
        facts = {**before, "load_average_after": environment()["load_average"]}
        write_json(options.json, {"environment": facts, **dataclasses.asdict(result)})

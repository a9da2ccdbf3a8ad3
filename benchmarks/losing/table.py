"""``results/faults.md``: the table F1 to F20, made of ``results/faults.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from report import environment, table, write_json

from losing.figures import exchanged, measure_again, soak_row
from losing.soak import soak

RESULTS = Path(__file__).parents[1] / "results"
SOURCE, PAGE = RESULTS / "faults.json", RESULTS / "faults.md"
_FIRST = "F1 to F20"
SOAK, SOAK_MINUTES = "F19", 20.0
NOTE = """F11 as it was meant, packets lost by `netem` for an hour, is not measured: a relay in user space delays what workers and store
say to each other, and holds it up where TCP would send again; what workers say among themselves it leaves alone. F12 is of
`stragglers_torch.json`."""


def markdown(result: Mapping[str, Any]) -> str:
    """The page."""
    facts = result["environment"]
    rows = [
        {
            "": row[""],
            "fault": row["injected"],
            "figure": row["figure"],
            "aim": f"<= {row['limit']:g}",
            "measured": "not measured" if row["measured"] is None else f"{row['measured']:.3g}",
            "reached": row["reached"],
            "command": f"`{row['command']}`",
            "measured anew": row.get("when", ""),
        }
        for row in result["tables"][_FIRST]
    ]
    where = (
        f"Real processes over gloo on {facts['machine']}, torch {facts['torch']}, commit {facts['commit']}, "
        f"{facts['date'][:10]}; the simulator where it says so. Made by `python benchmarks/faults.py --table` of `faults.json`."
    )
    lines = ["# What goes wrong, and what comes of it", where, table(rows), NOTE]
    for title, told in result["tables"].items():
        if title != _FIRST:
            lines += [f"## {title[0].upper()}{title[1:]}", table(told)]
    return "\n\n".join(lines) + "\n"


def measure_some_again(names: Sequence[str]) -> None:
    """Put these figures, measured now, in the place of those kept, one after the other, and make the page anew."""
    for name in names:
        result = json.loads(SOURCE.read_text())
        facts, tables = environment(), result["tables"]
        when = f"{facts['date'][:10]}, {facts['commit']}"
        if name == SOAK:
            told = soak(SOAK_MINUTES)
            tables = {title: rows for title, rows in tables.items() if "soak" not in title}
            tables[f"soak of {SOAK_MINUTES:g} minutes"] = [told]
            tables[_FIRST] = exchanged(tables[_FIRST], [soak_row(told) | {"when": when}])
        else:
            tables[_FIRST] = measure_again(name, tables[_FIRST], when)
        write_json(SOURCE, result | {"tables": tables})
        write_table()


def write_table() -> None:
    PAGE.write_text(markdown(json.loads(SOURCE.read_text())))

"""The cost model beside the lab: predicted over measured step times of the committed comparisons.

What a step takes to compute is the measured step of ``noop`` in the same comparison (:mod:`cells`).
Latency, what collectives and compression take, and the processor time of sending come from probes that were made in labs
of as many nodes, written by ``commkit probe``: where there is one of the comparison's own rate, as a user would make it
(``results/probes/FOLDER/N_nodes_RATE.json``), the link is what it found; else it is the nominal one, and the rest comes from
a lab of another rate (``N_nodes.json``). ``cells.ALONGSIDE`` says which folder is of a comparison's machine and day; since a
machine's other load differs, processor times are multiplied by the comparison's ``noop`` step over the probe's. Nothing is
fitted to a cell.

    python benchmarks/predicted.py [--probes DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import harness
from cells import Cell, cells, probe_for
from report import Result, Target, main

from commkit.advise import PLAIN, Question, Row, choose, kind_of
from commkit.cost.predict import Prediction

RESULTS = harness.ROOT / "benchmarks" / "results"
LAB = RESULTS / "lab"
WANTED = (0.85, 1.15)
NEAR = 1.1  # of the best: what the recommended scheme may take


def row_of(cell: Cell, found: Prediction) -> dict[str, Any]:
    step_s = cell.step_s(found)
    ratio = step_s / cell.seconds
    counted = cell.wire_bytes
    return {
        "comparison": cell.comparison,
        "scheme": cell.name,
        "noop s": cell.noop_s,
        "measured s": cell.seconds,
        "predicted s": step_s,
        "predicted / measured": ratio,
        "inside": WANTED[0] <= ratio <= WANTED[1],
        "in the error bar": found.low_s <= cell.seconds <= found.high_s,
        "wire, predicted / measured": cell.carried * found.wire_bytes / counted if counted else "",
    }


def recommended(found: dict[str, tuple[Cell, Prediction]]) -> dict[str, Any]:
    """The choice among what a comparison measured, with the utilisation that ``commkit advise`` aims at, beside the measured
    best. Where a step has not all ranks' batches in it, seconds are of as many steps as have."""
    rows = [
        Row(
            replace(prediction, scheme=name),
            kind_of(cell.scheme),
            True,
            prediction.utilisation >= Question.utilisation,
        )
        for name, (cell, prediction) in found.items()
    ]
    names, _ = choose(rows, Question.utilisation)
    seconds = {
        name: cell.seconds * cell.base_s / one.compute_s for name, (cell, one) in found.items()
    }
    best = min(seconds, key=lambda name: seconds[name])
    return {
        "recommended": names[0],
        "measured s": seconds[names[0]],
        "measured best": best,
        "best s": seconds[best],
        "near": seconds[names[0]] <= NEAR * seconds[best],
    }


def measure(options: argparse.Namespace) -> Result:
    result = Result("predicted", {"probes": str(options.probes.name)})
    rows, choices, unpredicted = [], [], []
    for path in sorted(LAB.glob("*.json")):
        found: dict[str, tuple[Cell, Prediction]] = {}
        for cell in cells(path):
            if cell.note:
                unpredicted.append(
                    {"comparison": path.stem, "scheme": cell.name, "note": cell.note}
                )
                continue
            prediction = cell.predicted(*probe_for(options.probes, cell))
            rows.append(row_of(cell, prediction))
            found[cell.name] = (cell, prediction)
        for alike in (
            {name: one for name, one in found.items() if not one[0].sharded_inside},
            {one[0].scheme: one for one in found.values() if one[0].sharded_inside},
        ):
            if len({cell.scheme for cell, _ in alike.values()}) > 1 and PLAIN in alike:
                choices.append({"comparison": path.stem, **recommended(alike)})
    result.tables = {"step time": rows, "recommended": choices, "not predicted": unpredicted}
    result.targets = targets(rows, choices)
    return result


def targets(rows: list[dict[str, Any]], choices: list[dict[str, Any]]) -> list[Target]:
    ratios = [row["predicted / measured"] for row in rows]
    inside, near = sum(row["inside"] for row in rows), sum(row["near"] for row in choices)
    middle = round(median(ratios), 3)
    return [
        Target(
            "median of predicted / measured within 0.85 to 1.15",
            None,
            middle,
            WANTED[0] <= middle <= WANTED[1],
        ),
        Target("all of them", None, f"{inside} of {len(rows)}", inside == len(rows)),
        Target(
            "recommended is the measured best or within 10 %",
            None,
            f"{near} of {len(choices)}",
            near == len(choices),
        ),
    ]


if __name__ == "__main__":
    main(
        __doc__,
        measure,
        lambda parser: parser.add_argument("--probes", type=Path, default=RESULTS / "probes"),
    )

"""How soon training goes on after a worker is lost, and what else goes wrong without harm.

    python benchmarks/faults.py [--workers 3 4 6] [--repeats 5] [--json FILE]    after a kill, after a stop
    python benchmarks/faults.py --figures                                        the table F1 to F20 besides
    python benchmarks/faults.py --soak 20                                        minutes of random kills and starts besides
    python benchmarks/faults.py --again F10 F19                                  these anew (F19 by a soak of 20 minutes), into results/faults.json
    python benchmarks/faults.py --table                                          results/faults.md anew, of results/faults.json

Real processes on this machine, over gloo.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
from typing import Any

import harness  # noqa: F401  (puts the repository on sys.path)
from losing.figures import figures
from losing.losses import lose
from losing.soak import soak
from losing.table import measure_some_again, write_table
from report import Result, Target, main

KNOWN_S, REDONE_S = 0.1, 1.0  # targets after a kill
GAP_S = 60.0  # the longest time without a step of a soak


def measure(options: argparse.Namespace) -> Result:
    sizes, repeats = ([3], 1) if options.quick else (options.workers, options.repeats)
    result = Result(
        "faults", {"numel": options.numel, "repeats": repeats, "limit_s": options.limit_s}
    )
    rows = measure_losses(result, options, sizes, repeats)
    told = soak(options.soak) if options.soak else {}
    if options.figures:
        result.tables["F1 to F20"] = figures(rows, told)
    if told:
        result.tables[f"soak of {options.soak:g} minutes"] = [told]
        longest = told["longest time without a step, s"]
        result.targets.append(
            Target.at_most("soak: longest time without a step, s", GAP_S, longest)
        )
    return result


def measure_losses(
    result: Result, options: argparse.Namespace, sizes: list[int], repeats: int
) -> list[dict[str, Any]]:
    title = "seconds after the loss, median and worst of the repeats"
    rows = result.tables[title] = []
    for number in (signal.SIGKILL, signal.SIGSTOP):
        for size in sizes:
            runs = [lose(size, options.numel, number, options.limit_s) for _ in range(repeats)]
            row: dict[str, Any] = {"signal": number.name, "workers": size}
            for what in runs[0]:
                row[what] = statistics.median(run[what] for run in runs)
                row[f"{what}, worst"] = max(run[what] for run in runs)
            rows.append(row)
    killed = [row for row in rows if row["signal"] == "SIGKILL"]
    stopped = [row for row in rows if row["signal"] == "SIGSTOP"]
    result.targets = [
        Target.at_most("kill: all know, s", KNOWN_S, max(r["all know"] for r in killed)),
        Target.at_most("kill: step redone, s", REDONE_S, max(r["step redone"] for r in killed)),
        Target.at_most(
            "stop: all know, s", options.limit_s + 1, max(r["all know"] for r in stopped)
        ),
    ]
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, nargs="+", default=[3, 4, 6])
    parser.add_argument("--numel", type=int, default=1_000_000, help="elements of the gradient")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--limit-s", type=float, default=5.0, help="when a stopped worker is left out"
    )
    parser.add_argument("--figures", action="store_true", help="F1 to F20")
    parser.add_argument("--soak", type=float, metavar="MINUTES", default=0.0)


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        write_table()
    elif sys.argv[1:2] == ["--again"]:
        measure_some_again(sys.argv[2:])
    else:
        main(__doc__, measure, add_options)

"""Runs every benchmark with a target and prints one table: target, measured, reached.

    python benchmarks/run_all.py [--quick] [--json FILE] [--results DIR]

Each program runs in a process of its own, one after another. The exit status is 0 if all of them ran,
whether or not a target was reached: figures are for people to judge.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness  # noqa: F401  (puts the repository on sys.path)
from report import Target, environment, table, target_rows, write_json

PROGRAMS = (
    "kernels",
    "hook_time",
    "bytes",
    "many_buckets",
    "memory",
    "heterogeneous",
    "allreduce_hook",
    "powersgd_vs_torch",
)
LIMIT_S = 5400.0


def run(name: str, quick: bool, file: Path) -> dict[str, Any] | None:
    """The program's JSON, or None if it failed; its output goes to ours."""
    command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), "--json", str(file)]
    try:
        done = subprocess.run([*command, *(["--quick"] if quick else [])], timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return None
    return json.loads(file.read_text()) if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--results", type=Path, metavar="DIR", help="write one file per program")
    parser.add_argument("--quick", action="store_true", help="a few steps each: do they run?")
    options = parser.parse_args()

    facts, results, rows = environment(), {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name in PROGRAMS:
            start = time.monotonic()
            print(f"\n=== {name}\n", flush=True)
            result = run(name, options.quick, Path(folder, f"{name}.json"))
            print(f"\n({time.monotonic() - start:.0f} s)", flush=True)
            results[name] = result
            if result is None:
                failed = Target("the program", None, "failed or ran out of time", False)
                rows += [{"benchmark": name, **row} for row in target_rows([failed])]
                continue
            targets = [Target(**target) for target in result["targets"]]
            rows += [{"benchmark": name, **row} for row in target_rows(targets)]
            if options.results is not None:
                write_json(options.results / f"{name}.json", result)
    print(f"\n=== summary{' (--quick: the figures mean nothing)' if options.quick else ''}\n")
    print(table(rows))
    if options.json is not None:
        write_json(options.json, {"environment": facts, "summary": rows, "results": results})
    sys.exit(any(result is None for result in results.values()))


if __name__ == "__main__":
    main()

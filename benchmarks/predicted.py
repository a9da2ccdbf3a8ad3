"""The cost model beside the lab: predicted over measured step times of the committed comparisons.

Calibrated are two things alone: the compute time, which is the measured step of ``noop`` in the same comparison, and
the link, whose rate is the lab's and whose latency is ``--latency``. Compression is timed on this machine with one
thread and scaled by the ranks that shared a core in the lab. Nothing is fitted to a cell.

    python benchmarks/predicted.py [--latency 0.0003] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import harness
import torch
from report import Result, Target, main

from commkit.cost.cluster import Cluster, Link
from commkit.cost.pace import Pace, pace_of
from commkit.cost.predict import Prediction, Round, Workload, predict
from commkit.cost.rounds import round_of
from commkit.cost.shapes import Shapes, shapes_of
from commkit.cost.traffic import law_of
from commkit.cost.units import parse_bandwidth
from launch import gpt
from launch.settings import ModelSettings

LAB = harness.ROOT / "benchmarks" / "results" / "lab"
LATENCY = 3e-4  # s, one way with gloo's work: an estimate, not measured
ALIKE = {"torch:ddp": "ddp"}  # other programs that do the same
# Recipes of local_updates_4_nodes_50mbit.md: scheme and steps per round.
ROUNDS = {
    "diloco_int8": "diloco",
    "streaming": "streaming_diloco",
    "noloco": "noloco",
    "co2": "co2",
    "edit": "edit",
    "dilocox": "dilocox",
}
SKIPPED = {
    "diloco_int8": "its reducer is not the scheme's own",
    "streaming": "its reducer is not the scheme's own",
    "dilocox": "its rank is not the scheme's own",
}
WANTED = (0.85, 1.15)


def model_shapes() -> Shapes:
    """Of the model of all comparisons in the lab."""
    settings = ModelSettings(layers=4, heads=8, width=512)
    return shapes_of(tuple(p.shape) for p in gpt.build(settings, 0).parameters())


def figures(comparison: dict[str, Any], name: str) -> dict[str, float]:
    """Medians of one configuration; empty if it did not finish."""
    found = next(c for c in comparison["configurations"] if c["name"] == name)
    return {k: v["median"] for k, v in (found["figures"] or {}).items() if v is not None}


def cells(path: Path) -> list[tuple[str, dict[str, float]]]:
    """(configuration, measured) of a comparison."""
    comparison = json.loads(path.read_text())
    return [(c["name"], figures(comparison, c["name"])) for c in comparison["configurations"]]


def predicted(path: Path, name: str, latency: float, pace: Pace | None = None) -> Prediction:
    """One configuration of a comparison.

    Args:
        pace: of the scheme; None times it.
    """
    comparison = json.loads(path.read_text())
    setting = comparison["setting"]
    nodes, per_node = setting["nodes"], setting["ranks_per_node"]
    cluster = Cluster(
        nodes,
        per_node,
        link=Link.of_rate(parse_bandwidth(setting["link"]), latency),
        local=Link(2e9, latency / 2),
    )
    work = Workload(model_shapes(), figures(comparison, "noop")["step_seconds"])
    scheme = ALIKE.get(name, ROUNDS.get(name, name))
    plan: Round | None = round_of(scheme, 64) if name in ROUNDS else None
    timed = pace_of(scheme) if pace is None else pace
    shared = max(1.0, nodes * per_node / comparison["machine"]["cores"])
    return predict(
        law_of(scheme), Pace(timed.alone * shared, timed.each * shared), work, cluster, plan
    )


def measure(options: argparse.Namespace) -> Result:
    torch.set_num_threads(1)
    result = Result("predicted", {"latency_s": options.latency})
    ratios: list[float] = []
    rows = []
    for path in sorted(LAB.glob("*.json")):
        for name, measured in cells(path):
            if name == "noop" or not measured:
                continue
            row: dict[str, Any] = {"comparison": path.stem, "scheme": name}
            if name.startswith("hsdp") or name == "torch_powersgd" or name in SKIPPED:
                rows.append(row | {"note": SKIPPED.get(name, "not a scheme of replicas here")})
                continue
            found = predicted(path, name, options.latency)
            seconds = measured["step_seconds"]
            if name in ROUNDS:  # steps differ, and their mean counts
                seconds = measured.get("mean_step_seconds", seconds)
            ratio = found.step_s / seconds
            ratios.append(ratio)
            rows.append(
                row
                | {
                    "measured s": seconds,
                    "predicted s": found.step_s,
                    "predicted / measured": ratio,
                    "inside": WANTED[0] <= ratio <= WANTED[1],
                    "wire, predicted / measured": found.wire_bytes / measured["wire_bytes"]
                    if measured.get("wire_bytes")
                    else "",
                }
            )
    result.tables["step time"] = rows
    inside = sum(WANTED[0] <= r <= WANTED[1] for r in ratios)
    result.targets = [
        Target(
            "median of predicted / measured within 0.85 to 1.15",
            None,
            round(median(ratios), 3),
            WANTED[0] <= median(ratios) <= WANTED[1],
        ),
        Target("all of them", None, f"{inside} of {len(ratios)}", inside == len(ratios)),
    ]
    return result


if __name__ == "__main__":
    main(
        __doc__,
        measure,
        lambda parser: parser.add_argument("--latency", type=float, default=LATENCY),
    )

"""Directories as finished runs leave them, with figures of our choice."""

import json
from pathlib import Path

from launch.compare.execute import Outcome
from launch.compare.plan import Configuration, Trial
from launch.rundir import METRIC_KEYS, RunDirectory


def trial(root: Path, name: str, seed: int = 0, round: int = 0) -> Trial:
    directory = root / f"{name.replace(':', '_')}-{seed}-{round}"
    return Trial(Configuration(name, Path(f"{name}.yaml")), seed, round, directory)


def finished(
    root: Path,
    name: str,
    *,
    seed: int = 0,
    round: int = 0,
    step_seconds: float = 0.1,
    wire_bytes: int | None = 1000,
    tx: tuple[int, ...] = (),
    packets: int = 1,
    steps: int = 10,
    val_loss: float = 2.0,
    **summary: float,
) -> Outcome:
    """Write a run in which every step is the same; ``tx`` are bytes per step of each interface."""
    made = trial(root, name, seed, round)
    run = RunDirectory(made.directory)
    made.directory.mkdir(parents=True)
    exposed = 0.25 * step_seconds
    fixed = {
        "loss": 3.0,
        "step_seconds": step_seconds,
        "compute_seconds": step_seconds - exposed,
        "exposed_comm_seconds": exposed,
        "comm_seconds": None if wire_bytes is None else 0.2 * step_seconds,
        "reduce_seconds": None if wire_bytes is None else 0.5 * step_seconds,
        "payload_bytes": wire_bytes,
        "wire_bytes": wire_bytes,
    }
    every = range(1, steps + 1)
    write(run.metrics, [dict.fromkeys(METRIC_KEYS, 0) | fixed | {"step": s} for s in every])
    write(run.validation, [{"step": s, "val_loss": val_loss} for s in every if s % 5 == 0])
    for node, sent in enumerate(tx):
        counts = {"tx_bytes": sent, "tx_packets": packets, "wire_bytes": wire_bytes}
        path = made.directory / "interface" / f"rank_{node:04d}.jsonl"
        write(path, [{"step": s, **counts} for s in every])
    text = json.dumps({"train_loss": 3.0, "val_loss": val_loss, **summary})
    run.summary.write_text(text)
    return Outcome(made, "finished", seconds=12.0)


def failed(root: Path, name: str, error: str, seed: int = 0) -> Outcome:
    return Outcome(trial(root, name, seed), "failed", error)


def write(path: Path, records: list) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))

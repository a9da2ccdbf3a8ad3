"""The files of one run, all in its ``--out`` directory.

- ``config.yaml``: the recipe with every default and override resolved;
- ``metrics.jsonl``: one object per step, with the keys of ``METRIC_KEYS``;
- ``validation.jsonl``: ``step``, ``val_loss`` and, if the task has it, ``val_accuracy`` of each
  evaluation on the way;
- ``summary.json``: totals, medians and final losses, written when the run ends;
- ``checkpoints/step_NNNNNN``: the newest two;
- ``interface/``: traffic of each machine, if asked for; see :mod:`launch.interface`.

All ranks must see the same directory; rank 0 alone writes, except into checkpoints.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from commkit.metrics import RunSummary, finite, summary
from commkit.runtime import checkpoint_files

# Bytes, rounds and seconds are those of this step on rank 0. The loss is the mean over the ranks in
# nats per byte or image, before the update. Tokens are counted over all ranks since the run began.
# Collectives take comm_seconds of the reductions' reduce_seconds, of which backward hides all but
# the exposed. Torch's own hooks do not count: there, values are null.
METRIC_KEYS = (
    "step",
    "loss",
    "lr",
    "tokens",
    "step_seconds",
    "compute_seconds",
    "exposed_comm_seconds",
    "comm_seconds",
    "reduce_seconds",
    "dense_bytes",
    "payload_bytes",
    "wire_bytes",
    "rounds",
    "residual_norm",
    "num_contributors",
    "nonfinite",
)
TRAIN_LOSS_STEPS = 10  # summary.json's train_loss is the mean of this many last steps
KEPT_CHECKPOINTS = 2


class RunDirectory:
    """Paths and bookkeeping of one ``--out`` directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.validation = path / "validation.jsonl"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self._lock: Any = None

    def checkpoint(self, step: int) -> Path:
        """Directory of the checkpoint made after ``step`` steps."""
        return self.checkpoints / f"step_{step:06d}"

    def complete_checkpoints(self) -> list[Path]:
        """Directories of finished checkpoints, oldest first."""
        complete = checkpoint_files.named(self.checkpoints.glob("step_*"))
        return sorted(complete, key=lambda path: int(path.name.removeprefix("step_")))

    def refuse_to_overwrite(self) -> None:
        """Raise unless a new run may start here.

        Raises:
            ValueError: there are checkpoints of an earlier run.
        """
        if self.complete_checkpoints():
            raise ValueError(
                f"--out: {str(self.path)!r} holds checkpoints of an earlier run; continue it with "
                "--resume, or give another directory"
            )

    def lock(self, patience_s: float = 10.0) -> None:
        """Keep other runs out until this process ends, however it ends.

        Args:
            patience_s: how long to wait for a killed run's last process to go.

        Raises:
            ValueError: another run is still writing here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("w")
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"--out: {str(self.path)!r} is being written by another run; "
                        "stop that run or give another directory"
                    ) from None
                time.sleep(0.1)

    def prepare(self, config: Mapping[str, Any], step: int) -> None:
        """Write the resolved configuration and cut the records back to the first ``step`` steps."""
        write_atomically(self.config, yaml.safe_dump(dict(config), sort_keys=False))
        for path in (self.metrics, self.validation):
            kept = [record for record in read_records(path) if record["step"] <= step]
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))

    def prune_checkpoints(self) -> None:
        """Remove all but the newest checkpoints, and what a killed run left unfinished."""
        for path in self.checkpoints.glob("*.partial"):
            shutil.rmtree(path)
        for path in self.complete_checkpoints()[:-KEPT_CHECKPOINTS]:
            checkpoint_files.remove(path)

    def write_summary(self, facts: Mapping[str, Any]) -> RunSummary:
        """Write ``summary.json``: ``facts`` and what the per-step records add up to, which is returned."""
        records = read_records(self.metrics)
        whole = {**facts, **aggregate(records)}
        write_atomically(self.summary, json.dumps(finite(whole), indent=2) + "\n")
        return summary(records)


def aggregate(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Totals and medians over per-step records; None where there is nothing to take them of."""
    told = summary(records)
    losses = [record["loss"] for record in records[-TRAIN_LOSS_STEPS:]]
    return {
        "train_loss": fmean(losses) if losses and None not in losses else None,
        "total_wire_bytes": told.wire_bytes,
        "total_payload_bytes": told.payload_bytes,
        "total_dense_bytes": told.dense_bytes,
        "median_step_seconds": told.median_step_seconds,
        "median_exposed_comm_seconds": told.median_exposed_comm_seconds,
        "exposed_share": told.exposed_share,
        "nonfinite_steps": told.nonfinite_steps,
    }


def read_records(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; none if it is missing.

    A last line without its end was cut by a kill and is left out.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def write_atomically(path: Path, text: str) -> None:
    """Replace a file as a whole: a reader sees the old text or the new, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)

"""Runs one trial: ``launch/train.py`` in real processes, and what is kept of it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import harness
import yaml
from report import environment, write_json
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from tqdm import tqdm

from commkit.registry import names
from launch import train
from launch.compare.failures import find_error
from launch.rundir import RunDirectory, read_records
from trials.plan import Trial
from trials.text import text_file

FINISHED, FAILED, MISSING = "finished", "failed", "not available"
LATE = 0.25  # the last part of a run, in which schemes with a warm-up are at work
# Everything that a rank would import, so that it does not.
PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.distributed.checkpoint",
    "torch._dynamo",
    "sklearn.datasets",
    "commkit",
    "launch.train",
    "launch.digits",
    "trials.execute",
)


def earlier(trial: Trial, work: Path) -> dict[str, Any] | None:
    """The result of the trial, if it has finished in ``work`` with the recipe that it has now."""
    file = trial.file(work)
    if not file.exists():
        return None
    result: dict[str, Any] = json.loads(file.read_text())
    same = digest(result["recipe"]) == digest(trial.recipe())
    return _marked(trial, result) if same and result["status"] == FINISHED else None


def recorded(trials: Sequence[Trial], file: Path) -> dict[str, dict[str, Any]]:
    """Results, by name, of those of ``trials`` that have finished in a JSON file of an earlier table, with the
    recipe that they have now."""
    told = {result["trial"]: result for result in json.loads(file.read_text())["trials"]}
    found = {trial.name: told.get(trial.name, {}) for trial in trials}
    return {
        trial.name: found[trial.name]
        for trial in trials
        if found[trial.name].get("recipe_digest") == digest(trial.recipe())
        and found[trial.name]["status"] == FINISHED
    }


def digest(recipe: Mapping[str, Any]) -> str:
    """Names a recipe."""
    text = json.dumps(recipe, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _marked(trial: Trial, result: dict[str, Any]) -> dict[str, Any]:
    """With what a table needs to know of where its trials come from."""
    known = {"recipe_digest": digest(trial.recipe()), "commit": result["environment"]["commit"]}
    return result | known


def execute(trial: Trial, work: Path, deadline_s: float) -> dict[str, Any]:
    """Run the trial and write its result into ``work``; a failure is a result."""
    facts = environment()
    start = time.monotonic()
    missing = missing_scheme(trial.system.scheme)
    if missing:
        told: dict[str, Any] = {"status": MISSING, "error": f"no scheme {missing!r}"}
    else:
        work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=work, prefix="running-") as folder:
            told = _train(trial, Path(folder), work, deadline_s)
    result = {
        "trial": trial.name,
        "recipe": trial.recipe(),
        **told,
        "seconds": round(time.monotonic() - start, 2),
        "environment": facts,
    }
    write_json(trial.file(work), result)
    return _marked(trial, result)


def missing_scheme(scheme: Mapping[str, Any]) -> str | None:
    """The name in the block, or in a block inside it, that this version does not know."""
    inner = scheme.get("scheme")
    if scheme["name"] not in names("scheme"):
        return str(scheme["name"])
    return missing_scheme(inner) if isinstance(inner, Mapping) else None


def _train(trial: Trial, folder: Path, work: Path, deadline_s: float) -> dict[str, Any]:
    recipe = trial.recipe()
    if trial.size.kind == "gpt":
        recipe["data"] = {"path": str(text_file(work).resolve())}
    config = folder / "recipe.yaml"
    config.write_text(yaml.safe_dump(json.loads(json.dumps(recipe))))
    run = RunDirectory(folder / "run")
    # As torchrun does it: the launcher keeps the store, on a port that the system chooses.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    outcomes = harness.run_ranks(
        train_rank,
        ["--config", str(config), "--out", str(run.path)],
        deadline_s=deadline_s,
        world_size=trial.ranks,
        environment={
            "WORLD_SIZE": str(trial.ranks),
            "LOCAL_WORLD_SIZE": str(trial.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        },
        preload=PRELOAD,
        join=False,
    )
    if any(outcome.status != "finished" for outcome in outcomes):
        return {"status": FAILED, "error": _reason(outcomes)}
    cpu = sum(outcome.value for outcome in outcomes)
    return {"status": FINISHED, **figures(run), "cpu_seconds": round(cpu, 2)}


def train_rank(rank: int, world_size: int, words: Sequence[str]) -> float:
    """What a rank does: ``launch/train.py``, its output beside its errors. Returns its CPU seconds."""
    os.dup2(2, 1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which os._exit() would leave behind
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    train.main(words)
    return time.process_time()


def figures(run: RunDirectory) -> dict[str, Any]:
    """What the table needs of a finished run. Bytes are those of rank 0."""
    summary: dict[str, Any] = json.loads(run.summary.read_text())
    records = read_records(run.metrics)
    late = [record["wire_bytes"] for record in records[-max(1, int(len(records) * LATE)) :]]
    data = {k: v for k, v in summary["data"].items() if k != "source"}
    return {
        "val_loss": summary["val_loss"],
        "val_accuracy": summary.get("val_accuracy"),
        "train_loss": summary["train_loss"],
        "first_loss": records[0]["loss"],
        "steps": summary["steps"],
        "parameters": summary["parameters"],
        "wire_bytes": summary["total_wire_bytes"],
        "late_wire_bytes_per_step": fmean(late),
        "step_seconds": summary["median_step_seconds"],
        "data": data,
    }


def _reason(outcomes: Sequence[harness.Outcome]) -> str:
    """The line that says best why the ranks failed."""
    bad = [outcome for outcome in outcomes if outcome.status != "finished"]
    told = [outcome for outcome in bad if outcome.status != "stopped"]
    # Of a rank that died, the detail is how, a colon, and what it printed.
    printed = [o.detail.partition(": ")[2] if o.status == "died" else o.detail for o in told]
    first = min(bad, key=lambda outcome: (outcome.status == "stopped", outcome.seconds))
    return find_error(printed) or " ".join(f"{first.status}: {first.detail}".split())[-400:]

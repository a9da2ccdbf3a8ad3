"""Runs of ``launch/train.py`` whose workers are killed: they go on, or stop with a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from launch.rundir import read_records
from launch.train import Arguments, SetupError, prepare

STEPS = 14
# launch/train.py, of which the worker with this RANK dies in this step.
MORTAL = """
import os, signal, sys
sys.path.insert(0, {root!r})
from launch import elastic, train
made = elastic.ElasticTrainer.step
def step(self, batches):
    if (os.environ["RANK"], self.progress.step) == ({rank!r}, {at}):
        os.kill(os.getpid(), signal.SIGKILL)
    return made(self, batches)
elastic.ElasticTrainer.step = step
if __name__ == "__main__":
    train.main()
"""


def _run(
    launcher: Any,
    folder: Path,
    recipe: str,
    workers: int,
    *options: str,
    lost: str = "none",
    **settings: str,
) -> tuple[int, str]:
    program = folder / "train.py"
    program.write_text(MORTAL.format(root=str(ROOT), rank=lost, at=6))
    words = ["-m", "launch.members", "--nproc", str(workers), str(program)]
    words += ["--config", f"configs/{recipe}.yaml", "--out", str(folder / "out"), *options]
    settings = {
        "elastic__heartbeat_s": "0.3",
        "elastic__limit_s": "4",
        "checkpoint__every": "4",
    } | settings
    process = launcher.spawn([*words, *launcher.settings(**settings)], 1)
    told, _ = process.communicate(timeout=110)
    return process.returncode, told


def test_a_run_goes_on_without_its_first_worker(launcher: Any, tmp_path: Path) -> None:
    """The one that writes the records: the next one takes them over."""
    code, told = _run(
        launcher, tmp_path, "powersgd", 3, lost="0", steps=str(STEPS), elastic__min_workers="2",
        eval__every="5", debug__check_replicas_every="3",
    )  # fmt: skip
    assert code == 0, told
    assert "worker 0 ended with -9" in told
    records = read_records(tmp_path / "out" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["workers"] for record in records] == [3] * 6 + [2] * (STEPS - 6)
    # What was given up was not counted, nor was its data used up.
    used = [record["tokens"] for record in records]
    steps = [b - a for a, b in zip([0, *used], used, strict=False)]
    assert steps == [steps[0]] * 6 + [steps[0] * 2 // 3] * (STEPS - 6)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["steps"], summary["world_size"]) == (STEPS, 2)


def test_too_few_workers_save_and_a_later_run_goes_on(launcher: Any, tmp_path: Path) -> None:
    settings = {
        "steps": str(STEPS),
        "scheme.sync_every": "4",
        "scheme.options.warmup_steps": "0",
    }
    code, told = _run(
        launcher, tmp_path, "diloco", 2, lost="1", elastic__min_workers="2", **settings
    )
    assert code, told
    assert "worker 0 ended with 3" in told
    assert "fewer than min_workers=2" in told
    saved = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert saved[-1] == "step_000008"  # where the round was due that did not take place
    code, told = _run(
        launcher, tmp_path, "diloco", 2, "--resume", elastic__min_workers="1", **settings
    )
    assert code == 0, told
    records = read_records(tmp_path / "out" / "metrics.jsonl")
    assert [record["step"] for record in records] == [*range(1, 8), *range(9, STEPS + 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme.name": "qsdp"}, "shards the model"),
        ({"scheme.name": "gradient_coding"}, "have roles"),
        ({"scheme.name": "torch:ddp"}, "torch's own"),
        ({"max_seconds": "5.0"}, "max_seconds needs all workers"),
        ({"elastic.limit_s": "0.1"}, "at least twice heartbeat_s"),
    ],
    ids=str,
)
def test_what_cannot_be_elastic_is_refused(
    launcher: Any, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    words = {"elastic.min_workers": "1", "data.path": str(launcher.text)} | change
    overrides = tuple(f"{name}={value}" for name, value in words.items())
    with pytest.raises(SetupError, match=message):
        prepare(Arguments(ROOT / "configs" / "ddp.yaml", overrides, out=tmp_path))

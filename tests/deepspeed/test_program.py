"""The reference program on DeepSpeed's engine, with the configs that are shipped."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.settings import TrainSettings

from ..launchers.test_launchers import TINY

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))


def run(config: Path, out: Path, *words: str) -> str:
    """Two ranks; what rank 0 printed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "tests.deepspeed.run_program", "--config", str(config)]
    command += ["--out", str(out), *words]
    processes = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = os.environ | {k: str(v) for k, v in place.items()} | {"PYTHONPATH": str(ROOT)}
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        texts = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], texts
    return texts[0]


def words(path: Path, steps: int) -> list[str]:
    text = path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    changes = {**TINY, "data.path": str(text)}
    del changes["batch.per_rank"]
    return [
        "--steps",
        str(steps),
        *(word for name, value in changes.items() for word in ("--set", f"{name}={value}")),
    ]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_former_config_trains(tmp_path):
    run(ROOT / "configs" / "deepspeed" / "onebit_adam.json", tmp_path / "run", *words(tmp_path, 3))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["world_size"]) == (3, 2)
    assert summary["scheme"] == "onebit_adam"
    assert summary["total_wire_bytes"] > 0
    assert len(losses(tmp_path / "run")) == 3


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    config = ROOT / "configs" / "deepspeed" / "powersgd_zero3.json"
    given = [*words(tmp_path, 4), "--set", "checkpoint.every=2"]
    run(config, tmp_path / "whole", *given)
    # As if it had been killed after half of its steps.
    later = shutil.ignore_patterns("step_000004", ".lock", "summary.json")
    shutil.copytree(tmp_path / "whole", tmp_path / "halves", ignore=later)
    (tmp_path / "halves" / "checkpoints" / "latest").write_text("step_000002")
    run(config, tmp_path / "halves", *given, "--resume")
    whole = json.loads((tmp_path / "whole" / "summary.json").read_text())
    halves = json.loads((tmp_path / "halves" / "summary.json").read_text())
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    assert halves["val_loss"] == whole["val_loss"]
    assert halves["total_wire_bytes"] == whole["total_wire_bytes"] > 0


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_plans(config):
    """Every one is read, and asks something of commkit."""
    from commkit.adapters.deepspeed.initialize import make_plan
    from launch.deepspeed_train import read_settings
    from launch.gpt import build
    from launch.optimizer import decaying_groups
    from launch.settings import ModelSettings
    from launch.train import Arguments

    settings = read_settings(Arguments(config))
    assert isinstance(settings, TrainSettings)
    model = build(ModelSettings(layers=1, heads=2, width=32), 0)
    plan = make_plan(dict(settings.scheme["ds_config"]), model, None, decaying_groups(model))
    assert plan.scheme is not None
    assert "commkit" not in plan.config


def test_what_the_config_says_is_not_said_twice():
    from launch.deepspeed_train import read_settings
    from launch.train import Arguments

    with pytest.raises(ValueError, match=r"--set optim.betas: that is for .* to say"):
        read_settings(Arguments(CONFIGS[0], ("optim.betas=[0.9, 0.95]",)))

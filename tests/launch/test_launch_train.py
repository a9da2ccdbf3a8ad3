import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.rundir import METRIC_KEYS, read_records
from launch.schedule import learning_rate
from launch.settings import ScheduleSettings
from launch.train import Arguments, SetupError, prepare

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
# A server or coordinator needs others, so they are tested on their own.
WITH_ROLES = {"async_local_sgd", "backup", "dbw", "gradient_coding", "m_sgc", "sr_sgc"}
STEPS = 12
# Steps of about a tenth of a second, long enough to be killed between two of them.
SETTINGS = {
    "model__width": "64",
    "model__context": "64",
    "batch__per_rank": "4",
    "batch__accumulate": "16",
    "checkpoint__every": "3",
    "eval__every": "4",
}


def losses(out):
    return {record["step"]: record["loss"] for record in read_records(out / "metrics.jsonl")}


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def unbroken(launcher, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    launcher.run("powersgd", out, "--steps", STEPS, **SETTINGS)
    return out


def test_metrics_have_the_agreed_keys(unbroken):
    records = read_records(unbroken / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record in records:
        assert tuple(record) == METRIC_KEYS
        assert all(isinstance(value, int | float) for value in record.values())


def test_metrics_are_true_to_each_other(unbroken):
    for record in read_records(unbroken / "metrics.jsonl"):
        assert record["tokens"] == record["step"] * 2 * 4 * 16 * 64
        assert record["num_contributors"] == 2
        assert 0 < record["exposed_comm_seconds"] < record["step_seconds"]
        both = record["compute_seconds"] + record["exposed_comm_seconds"]
        assert math.isclose(both, record["step_seconds"])
        assert 0 < record["payload_bytes"] < record["dense_bytes"]
        assert record["rounds"] > 0
        assert record["residual_norm"] > 0


def test_summary_is_what_the_records_add_up_to(unbroken):
    records = read_records(unbroken / "metrics.jsonl")
    summary = summary_of(unbroken)
    assert summary["scheme"] == "powersgd"
    assert summary["world_size"] == 2
    assert summary["steps"] == STEPS
    assert math.isclose(summary["train_loss"], sum(r["loss"] for r in records[-10:]) / 10)
    assert summary["total_wire_bytes"] == sum(r["wire_bytes"] for r in records)
    assert summary["total_dense_bytes"] == 4 * summary["parameters"] * STEPS
    assert math.isfinite(summary["val_loss"])
    assert summary["wall_seconds"] >= sum(r["step_seconds"] for r in records)
    assert {"python", "torch", "commkit"} <= set(summary["versions"])


def test_validation_is_recorded_on_the_way(unbroken):
    records = read_records(unbroken / "validation.jsonl")
    assert [record["step"] for record in records] == [4, 8, 12]
    assert records[-1]["val_loss"] == summary_of(unbroken)["val_loss"]


def test_newest_two_checkpoints_are_kept(unbroken):
    names = sorted(path.name for path in (unbroken / "checkpoints").iterdir())
    assert names == ["step_000009", "step_000012"]


def test_resuming_after_a_kill_changes_no_bit(launcher, unbroken, tmp_path):
    process = launcher.start("powersgd", tmp_path, "--steps", str(STEPS), **SETTINGS)
    launcher.wait_until(lambda: bool(losses(tmp_path)) or process.poll() is not None)
    family = launcher.family(process)
    launcher.wait_until(lambda: len(losses(tmp_path)) >= 7 or process.poll() is not None)
    launcher.kill(family)
    process.wait(timeout=10)
    assert 7 <= len(losses(tmp_path)) < STEPS
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # a kill may cut a line
    output = launcher.run("powersgd", tmp_path, "--steps", STEPS, "--resume", **SETTINGS)
    assert re.search(r"step [69] of 12", output)
    assert losses(tmp_path) == losses(unbroken)
    resumed, whole = (read_records(out / "metrics.jsonl") for out in (tmp_path, unbroken))
    for name in ("tokens", "lr", "residual_norm", "wire_bytes"):
        assert [record[name] for record in resumed] == [record[name] for record in whole]
    assert summary_of(tmp_path)["val_loss"] == summary_of(unbroken)["val_loss"]


def test_where_a_run_stops_does_not_change_its_steps(launcher, tmp_path):
    """One process without torchrun; dropout, so that random state must be restored as well."""
    settings = {"ranks": 1, "model__dropout": "0.1"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    launcher.run("ddp", whole, "--steps", 8, **settings)
    launcher.run("ddp", parts, "--steps", 5, **settings)
    launcher.run("ddp", parts, "--steps", 8, "--resume", **settings)
    assert losses(parts) == losses(whole)
    schedule = ScheduleSettings(warmup=3, length=20)
    rates = [record["lr"] for record in read_records(whole / "metrics.jsonl")]
    assert rates == [learning_rate(step, 2e-3, schedule) for step in range(1, 9)]
    assert all(record["wire_bytes"] == 0 for record in read_records(whole / "metrics.jsonl"))


def test_time_that_is_up_ends_the_run_on_all_ranks(launcher, tmp_path, unbroken):
    launcher.run("powersgd", tmp_path, "--steps", STEPS, **SETTINGS, max_seconds="1e-9")
    assert summary_of(tmp_path)["steps"] == 1
    launcher.run("powersgd", tmp_path, "--steps", STEPS, "--resume", **SETTINGS)
    assert losses(tmp_path) == losses(unbroken)


def test_local_updates_resume_inside_a_round(launcher, tmp_path):
    """Replicas differ then: each continues with its own weights, on its own data."""
    settings = {"scheme__sync_every": "4", "scheme__options": "{warmup_steps: 2}"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    launcher.run("diloco", whole, "--steps", 9, **settings)
    launcher.run("diloco", parts, "--steps", 5, **settings)
    launcher.run("diloco", parts, "--steps", 9, "--resume", **settings)
    assert losses(parts) == losses(whole)
    wire = [record["wire_bytes"] for record in read_records(whole / "metrics.jsonl")]
    dense, compressed = wire[0], wire[5]
    assert wire == [dense, dense, 0, 0, 0, compressed, 0, 0, 0]
    assert compressed < dense / 3.5
    assert summary_of(parts)["val_loss"] == summary_of(whole)["val_loss"]


def test_resuming_a_finished_run_ends_well(launcher, unbroken):
    before = losses(unbroken)
    output = launcher.run("powersgd", unbroken, "--steps", STEPS - 2, "--resume", **SETTINGS)
    assert "Traceback" not in output
    assert losses(unbroken) == before
    assert summary_of(unbroken)["steps"] == STEPS


def test_ranks_die_with_their_launcher(launcher, tmp_path):
    process = launcher.start("ddp", tmp_path, "--steps", "1000000")
    launcher.wait_until(lambda: bool(losses(tmp_path)) or process.poll() is not None)
    family = launcher.family(process)
    assert len(family) == 3
    launcher.kill([process.pid])
    process.wait(timeout=10)
    launcher.wait_until(lambda: not launcher.alive(family))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": ("optim.learning_rate=1",)}, r"optim\.learning_rate: unknown field"),
        ({"overrides": ("data.path=/nowhere",)}, r"data\.path: '/nowhere' does not exist"),
        ({"config": Path("configs/nothing.yaml")}, r"configs/nothing\.yaml"),
        ({"overrides": ("device=cuda",)}, r"device: got cuda with 1 ranks .* 0 GPUs"),
        ({"steps": 0}, r"steps=0.*greater than or equal to 1"),
    ],
)
def test_bad_input_is_found_before_any_communication(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = Arguments(config=ROOT / "configs" / "ddp.yaml", out=tmp_path)
    with pytest.raises(SetupError, match=message):
        prepare(replace(arguments, **options))


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("{name: powresgd}", r"scheme\.name: .*'powresgd'.*'powersgd'"),
        ("{name: powersgd, rank: 0}", r"scheme.*rank.*0"),
    ],
)
def test_bad_scheme_is_one_line_and_fails(launcher, tmp_path, scheme, message):
    process = launcher.start("ddp", tmp_path, ranks=1, scheme=scheme)
    output = launcher.finish(process)
    assert process.returncode == 2
    (line,) = output.splitlines()
    assert re.search(message, line), line


def test_bad_input_on_all_ranks_is_told_by_rank_0(launcher, tmp_path):
    process = launcher.start("ddp", tmp_path, scheme__name="powresgd")
    output = launcher.finish(process)
    assert process.returncode != 0
    assert re.findall(r"^error on rank (\d)", output, re.MULTILINE) == ["0"]


def test_another_run_s_checkpoints_are_not_overwritten(launcher, unbroken):
    process = launcher.start("powersgd", unbroken, ranks=1)
    output = launcher.finish(process)
    assert process.returncode == 2
    assert re.search(r"--out: .* holds checkpoints of an earlier run; .*--resume", output)


def test_another_run_is_not_resumed(launcher, unbroken):
    process = launcher.start("powersgd", unbroken, "--resume", ranks=1, **SETTINGS, optim__lr="0.5")
    output = launcher.finish(process)
    assert process.returncode == 2
    assert re.search(r"--resume: optim is .*0\.5.*, but the run in .* has .*0\.002", output)


def test_another_number_of_ranks_can_be_refused(launcher, unbroken):
    process = launcher.start(
        "powersgd",
        unbroken,
        "--resume",
        ranks=1,
        **SETTINGS,
        checkpoint__on_world_size_change="error",
    )
    output = launcher.finish(process)
    assert process.returncode == 2
    assert re.search(r"was saved by 2 ranks and this job has 1; start 2", output)


@pytest.mark.timeout(300)
def test_every_recipe_trains(launcher, tmp_path):
    program = [str(ROOT / "tests" / "launch" / "every_recipe.py"), str(tmp_path)]
    process = launcher.spawn([*program, "--steps", "5", *launcher.settings()], ranks=1)
    output = launcher.finish(process, timeout_s=240)
    assert process.returncode == 0, output
    assert {path.name for path in tmp_path.iterdir()} == RECIPES - WITH_ROLES
    for out in tmp_path.iterdir():
        assert len(losses(out)) == 5

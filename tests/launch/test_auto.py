"""``--scheme auto``: chooses, says why, and checks what it predicted."""

import json

import pytest
import torch

from commkit.probe import ProbeError
from commkit.probe.report import model_found
from launch import auto
from launch.expectation import Expectation
from launch.rundir import read_records
from launch.tasks import make_task
from launch.train import Arguments, SetupError, prepare, read_settings
from launch.world import World
from tests.launch.conftest import ROOT
from tests.probe.found import probe_of


def expectation(step_s=1.0, **fields):
    return Expectation(
        "int8", "why", step_s, **{"in_rounds": False, "sync_every": 1, "last": 20, **fields}
    )


def verdict(expected, seconds):
    told = [expected.see(step, s) for step, s in enumerate(seconds, start=1)]
    assert [line for line in told[: expected.last - 1] if line] == []
    return told[expected.last - 1]


def test_a_prediction_that_holds_is_told_once():
    expected = expectation()
    line = verdict(expected, [9.0] * 5 + [1.1] * 20)  # the first steps settle
    assert "warning" not in line
    assert expected.facts()["measured_step_seconds"] == pytest.approx(1.1)


@pytest.mark.parametrize("measured", [1.5, 0.7])
def test_one_that_does_not_is_a_warning_with_both_figures(measured):
    line = verdict(expectation(), [measured] * 20)
    assert "warning" in line
    assert "predicted 1 s per step" in line
    assert f"measured {measured} s" in line


def test_of_rounds_the_mean_of_whole_ones_counts():
    expected = expectation(1.4, in_rounds=True, sync_every=5)
    assert "warning" not in verdict(expected, [1.0, 1.0, 1.0, 1.0, 3.0] * 4)
    assert expected.measured_s == pytest.approx(1.4)


def test_a_run_chooses_and_says_so(launcher, tmp_path):
    out = tmp_path / "run"
    words = launcher.run("ddp", out, "--scheme", "auto", "--steps", "8", checkpoint__every="4")
    assert "scheme auto: " in words
    assert "measured" in words
    told = json.loads((out / "summary.json").read_text())["auto"]
    assert told["chosen"] in words
    assert told["predicted_step_seconds"] > 0
    assert len(read_records(out / "metrics.jsonl")) == 8
    # A resumed run keeps what was chosen.
    again = launcher.run("ddp", out, "--scheme", "auto", "--steps", "10", "--resume")
    assert "scheme auto: " not in again
    assert len(read_records(out / "metrics.jsonl")) == 10


def test_a_probe_without_auto_is_refused(tmp_path):
    with pytest.raises(SetupError, match="--probe: given without --scheme auto"):
        prepare(
            Arguments(
                config=ROOT / "configs" / "ddp.yaml", out=tmp_path, probe=tmp_path / "probe.json"
            )
        )


@pytest.fixture
def job(launcher):
    """Settings and task of a tiny run."""
    words = tuple(word for word in launcher.settings() if word != "--set")
    settings = read_settings(Arguments(config=ROOT / "configs" / "ddp.yaml", overrides=words))
    return settings, make_task(settings)


def picked(job, tmp_path, world_size=4, **probe):
    settings, task = job
    file = tmp_path / "probe.json"
    file.write_text(probe_of(**probe).model_dump_json())
    world = World(rank=0, local_rank=0, size=world_size, local_size=1, launched=False)
    return auto.pick(settings, task, world, torch.device("cpu"), file)


def test_the_choice_is_that_of_the_probe(job, tmp_path):
    of_this = {"model": model_found(job[1].build())}
    fast, _ = picked(job, tmp_path, link_mbit=1e9, latency_s=0.0, **of_this)
    assert fast.scheme == {"name": "ddp"}
    paces = {"ddp": 0.0, "diloco": 1e-10}
    slow, expected = picked(job, tmp_path, link_mbit=10, step_s=0.1, paces=paces, **of_this)
    assert slow.scheme["name"] == expected.scheme == "diloco"
    assert expected.sync_every == slow.scheme["sync_every"] > 1
    assert expected.last >= expected.sync_every
    assert expected.reason.startswith("diloco every")


def test_probes_of_another_model_or_cluster_are_refused(job, tmp_path):
    with pytest.raises(ProbeError, match="it is of a model of 10,010,000 parameters"):
        picked(job, tmp_path)
    with pytest.raises(ProbeError, match="it is of 4 ranks, this run has 3"):
        picked(job, tmp_path, world_size=3, model=model_found(job[1].build()))

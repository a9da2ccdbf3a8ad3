"""``--scheme auto``: chooses, says why, and checks what it predicted."""

import json

import pytest

from launch.expectation import Expectation
from launch.rundir import read_records
from launch.train import Arguments, SetupError, prepare
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


def test_a_probe_of_another_model_is_refused(launcher, tmp_path):
    file = tmp_path / "probe.json"
    file.write_text(probe_of().model_dump_json())
    options = ("--scheme", "auto", "--probe", str(file))
    process = launcher.start("ddp", tmp_path / "run", *options, ranks=1)
    words = launcher.finish(process)
    assert process.returncode == 2
    assert "it is of a model of 10,010,000 parameters" in words

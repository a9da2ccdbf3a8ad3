"""A scenario in the lab: the same methods, small, and what was simulated beside what was measured."""

import json

import pytest
import torch
import yaml

from commkit import cli
from commkit.config import ConfigError, apply_overrides, load_yaml, validate
from commkit.cost.scenario import Scenario
from commkit.cost.simulate import simulate
from launch.compare import scenario as beside
from launch.compare.plan import ROOT, Configuration, Trial
from launch.netlab import LabError, NodeResult
from launch.optimizer import make_optimizer
from launch.rundir import METRIC_KEYS, RunDirectory
from launch.settings import TrainSettings
from tests.compare.runs import write
from tests.probe.found import probe_of

FILE = {
    "nodes": 1024,
    "ranks_per_node": 4,
    "model_size": "1B",
    "link": {"rate": "10gbit", "latency_sigma": 0.5},
    "compute": {
        "seconds": 3,
        "jitter": 0.1,
        "spread": 0.2,
        "stragglers": {"enter": 0.1, "leave": 0.5, "slowdown": 3},
    },
    "failures": {"mean_seconds": 1e6, "restart_seconds": 60},
    "methods": [
        {"scheme": "diloco", "sync_every": 100},
        {"scheme": "int8"},
        {"scheme": "fsdp"},
        {"scheme": "async_local_sgd", "sync_every": 50},
    ],
    "lab": {"nodes": 4, "rate": "50mbit", "sync_every": 10, "settings": {"model.width": 64}},
}


@pytest.fixture
def small():
    whole = validate(Scenario, FILE, "here")
    return beside.in_lab(whole, whole.lab)


def test_the_lab_has_the_same_methods_small(small):
    found, notes = small
    assert (found.nodes, found.ranks_per_node) == (4, 1)
    assert [(m.scheme, m.sync_every) for m in found.methods] == [
        ("ddp", None),
        ("diloco", 10),
        ("int8", None),
        ("fsdp", None),
    ]
    assert found.failures is found.compute.stragglers is None
    for what in ("async_local_sgd", "slow phases", "unequal speed", "failures", "log-normal"):
        assert any(what in note for note in notes)


def test_recipes_are_those_of_the_simulation(small, tmp_path):
    files = beside.recipes(small[0], tmp_path)
    assert [load_yaml(file) for file in files] == [
        {"scheme": {"name": "diloco", "sync_every": 10}},
        {"scheme": {"name": "int8"}},
        {"scheme": {"name": "qsdp", "weight_bits": 32, "gradient_bits": 32}},
    ]
    assert "model.width=64" in beside.overrides(validate(Scenario, FILE, "here").lab)


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "scenarios").glob("*.yaml")), ids=str)
def test_recipes_of_the_claims_can_be_trained(file, tmp_path):
    whole = validate(Scenario, load_yaml(file), str(file))
    if whole.lab is None:
        pytest.skip("not for the lab")
    for recipe in beside.recipes(beside.in_lab(whole, whole.lab)[0], tmp_path):
        data = apply_overrides(load_yaml(recipe), beside.overrides(whole.lab))
        make_optimizer(torch.nn.Linear(4, 4), validate(TrainSettings, data, str(recipe)))


def test_what_is_simulated_has_the_probes_times_and_links(small):
    """Without chance a simulation is the prediction, which is the probe's step plus what is not hidden."""
    probe = probe_of(
        link_mbit=1e9, latency_s=0.0, paces=dict.fromkeys(["ddp", "diloco", "int8"], 0.0)
    )
    for one in beside.simulated(small[0], probe):
        assert one.step_s == pytest.approx(probe.compute.step_s, rel=1e-3)
    slow = probe_of(link_mbit=1.0)
    assert all(o.step_s > slow.compute.step_s for o in beside.simulated(small[0], slow))
    for one in beside.simulated(small[0], probe, slower=3.0):
        assert one.step_s == pytest.approx(3 * probe.compute.step_s, rel=1e-3)
    # The scenario's own link and model do not matter there.
    assert simulate(small[0])[0].step_s != beside.simulated(small[0], probe)[0].step_s


def run(trial, seconds, sent):
    """Leave a run whose step ``s`` took ``seconds(s)``."""
    directory = RunDirectory(trial.directory)
    trial.directory.mkdir(parents=True)
    fixed = dict.fromkeys(METRIC_KEYS, 0)
    steps = range(1, 41)
    write(
        directory.metrics,
        [fixed | {"step": s, "step_seconds": seconds(s), "wire_bytes": sent(s)} for s in steps],
    )
    directory.summary.write_text("{}")


def test_rounds_count_whole_and_the_first_does_not(small, tmp_path):
    pytest.importorskip("matplotlib")
    found = small[0]
    trials = [
        Trial(Configuration(name, tmp_path / f"{name}.yaml"), 0, 0, tmp_path / name)
        for name in ("noop", "ddp", "diloco_10", "int8")
    ]
    run(trials[0], lambda s: 0.5, lambda s: 0)
    run(trials[1], lambda s: 2.0 if s > 1 else 50.0, lambda s: 7e6)
    # A synchronisation of two seconds every ten steps, and one slow step in the first round.
    run(
        trials[2],
        lambda s: 9.0 if s == 1 else 0.5 + 2.0 * (s % 10 == 0),
        lambda s: 1e6 * (s % 10 == 0),
    )
    (tmp_path / "compare.json").write_text(
        '{"machine": {"cores": 2}, "configurations": [{"runs": [{"load": 1.5}, {"load": 3}]}]}'
    )
    text = beside.conclude(found, ["a note"], trials, probe_of(), tmp_path)
    assert "load average before the runs: 1.5 to 3.0 on 2 cores" in text
    told = json.loads((tmp_path / "scenario.json").read_text())
    rows = {row["scheme"]: row for row in told["rows"]}
    assert rows["noop"]["measured_s"] == 0.5 == rows["noop"]["simulated_s"]
    assert rows["ddp"]["measured_s"] == 2.0
    assert (
        rows["ddp"]["adjusted_s"] == rows["ddp"]["simulated_s"]
    )  # noop took what it did in the probe
    assert rows["diloco"]["measured_s"] == pytest.approx(0.7)
    assert rows["diloco"]["measured_bytes"] == pytest.approx(1e5)
    assert rows["int8"]["runs"] == 0
    assert rows["int8"]["measured_s"] is None
    assert "- a note" in text
    assert (tmp_path / "scenario.md").read_text() == text
    assert (tmp_path / "scenario.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"lab": None}, [], "lab is missing"),
        ({"lab": {"nodes": 1}}, [], "lab.nodes"),
        ({"lab": {"rate": "fast"}}, [], "rate: got 'fast'"),
        ({"lab": {"settings": {"model.widht": 8}}}, [], "widht"),
        ({"methods": [{"scheme": "int9"}]}, [], "int9"),
        ({}, ["--json"], "leave --plot and --json out"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_built(
    changes, words, message, tmp_path, capsys
):
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(FILE | changes))
    assert cli.main(["simulate", str(file), "--lab", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_failed_probe_is_told(small, tmp_path):
    class Broken:
        def torchrun(self, *args, **options):
            return [NodeResult(0, 0, ""), NodeResult(1, 1, "no gloo")]

    with pytest.raises(LabError, match="failed on node 1: no gloo"):
        beside.probing(small[0], validate(Scenario, FILE, "here").lab, tmp_path)(Broken())
    with pytest.raises(ConfigError, match="lab is missing"):
        beside.lab_of(small[0].model_copy(update={"lab": None}), "s.yaml")

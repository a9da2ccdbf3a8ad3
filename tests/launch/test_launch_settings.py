import math
from itertools import pairwise
from pathlib import Path

import pytest

from commkit.config import ConfigError, apply_overrides, load_yaml, validate
from launch.schedule import learning_rate
from launch.settings import ScheduleSettings, TrainSettings

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
SCHEDULE = ScheduleSettings(warmup=10, length=100, min_lr=0.1)


def settings(*overrides):
    data = apply_overrides({"scheme": {"name": "ddp"}}, overrides)
    return validate(TrainSettings, data, "test.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipes_are_named_for_what_they_run(path):
    recipe = validate(TrainSettings, load_yaml(path), str(path))
    assert recipe.scheme["name"] == path.stem


def test_resolved_settings_read_back_as_the_same():
    resolved = settings("optim.betas=[0.8, 0.9]", "optim.lr=1e-2", "data.path=/x")
    assert validate(TrainSettings, resolved.model_dump(mode="json"), "again") == resolved


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.learning_rate=0.1", ["optim.learning_rate", "unknown field"]),
        ("modle={}", ["modle", "model"]),
        ("model.laeyrs=2", ["model.laeyrs", "layers"]),
        ("steps=0", ["steps", "0", "greater than or equal to 1"]),
        ("steps=ten", ["steps", "ten", "integer"]),
        ("steps=1.5", ["steps", "1.5", "integer"]),
        ("optim.lr=-1", ["optim.lr", "-1", "greater than 0"]),
        ("optim.lr=.inf", ["optim.lr", "inf", "finite"]),
        ("optim.betas=[0.9, 1.5]", ["optim.betas.1", "1.5", "less than 1"]),
        ("precision=fp8", ["precision", "fp8", "'fp32' or 'bf16'"]),
        ("model.dropout=1.0", ["model.dropout", "less than 1"]),
        ("model.width=30", ["model", "width=30", "heads=4", "multiple", "choose"]),
        ("schedule.warmup=500", ["schedule", "warmup=500", "shorter than length", "raise"]),
        ("schedule.min_lr=1.0", ["schedule", "min_lr", "1.0", "optim.lr", "lower"]),
        ("optim.lr=1e-4", ["min_lr", "0.0001", "optim.lr", "lower"]),
        (
            "scheme={name: dgc, warmup_steps: 300}",
            ["scheme.warmup_steps", "shorter than the run", "300", "schedule.length=300", "lower"],
        ),
        (
            "scheme={name: compose, aggregator: {compressor: {name: topk, warmup_steps: 400}}}",
            ["scheme.warmup_steps", "400"],
        ),
        ("scheme={rank: 4}", ["scheme", "name", "commkit schemes"]),
        ("tensorboard=1", ["tensorboard", "boolean"]),
    ],
)
def test_bad_settings_are_named(override, words):
    with pytest.raises(ConfigError) as raised:
        settings(override)
    assert [word for word in words if word not in str(raised.value)] == []


def test_a_density_warm_up_counts_against_the_whole_run_not_against_where_it_stops():
    dgc = "scheme={name: dgc, warmup_steps: 100}"
    assert settings(dgc, "steps=5").scheme["warmup_steps"] == 100
    assert settings(dgc, "schedule.length=50", "steps=400").steps == 400
    with pytest.raises(ConfigError, match="shorter than the run"):
        settings(dgc, "schedule.length=50", "steps=60")


def test_several_faults_are_told_at_once():
    with pytest.raises(ConfigError, match=r"steps=0.*optim\.lr=-1"):
        settings("steps=0", "optim.lr=-1")


def test_warmup_is_linear_and_ends_at_the_peak():
    assert [learning_rate(step, 1.0, SCHEDULE) for step in (1, 5, 10)] == [0.1, 0.5, 1.0]


def test_rate_is_min_lr_from_length_on():
    assert [learning_rate(step, 1.0, SCHEDULE) for step in (100, 101, 10**6)] == [0.1] * 3


def test_rate_is_halfway_down_halfway_along():
    assert math.isclose(learning_rate(55, 1.0, SCHEDULE), 0.55)


def test_rate_falls_after_the_warmup():
    rates = [learning_rate(step, 1.0, SCHEDULE) for step in range(10, 101)]
    assert all(later < earlier for earlier, later in pairwise(rates))


def test_no_warmup_begins_near_the_peak():
    schedule = ScheduleSettings(warmup=0, length=100, min_lr=0.0)
    assert learning_rate(1, 1.0, schedule) == 0.5 * (1 + math.cos(math.pi / 100))

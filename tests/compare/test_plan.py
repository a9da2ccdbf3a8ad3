from collections import Counter
from pathlib import Path

import pytest

from commkit.config import ConfigError
from launch.compare import plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def names(configurations):
    return [configuration.name for configuration in configurations]


def test_ddp_and_the_bound_always_run():
    assert names(plan.choose([], [])) == ["ddp", "noop"]
    chosen = plan.choose([CONFIGS / "sign.yaml", CONFIGS / "ddp.yaml"], ["torch:fp16"])
    assert names(chosen) == ["ddp", "sign", "torch:fp16", "noop"]


def test_every_configuration_runs_once_a_block_and_each_begins_in_turn(tmp_path):
    configurations = plan.choose([CONFIGS / "sign.yaml"], [])
    trials = plan.order(configurations, seeds=2, rounds=3, out=tmp_path)
    size = len(configurations)
    blocks = [trials[i : i + size] for i in range(0, len(trials), size)]
    assert [block[0].block for block in blocks] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    for block in blocks:
        assert len({trial.block for trial in block}) == 1
        assert sorted(t.configuration.name for t in block) == ["ddp", "noop", "sign"]
    firsts = Counter(block[0].configuration.name for block in blocks)
    assert firsts == {"ddp": 2, "noop": 2, "sign": 2}
    assert len({trial.directory for trial in trials}) == len(trials)


def test_arguments_of_a_run(tmp_path):
    (trial,) = plan.order(plan.choose([], ["torch:fp16"])[1:2], 1, 1, tmp_path)
    words = plan.words(trial, steps=50, overrides=["eval.every=7", "seed=9"])
    settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    assert "scheme={name: 'torch:fp16'}" in settings
    assert settings.index("eval.every=7") > settings.index("eval.every=5")
    assert settings[-1] == "seed=0"
    assert words[words.index("--steps") + 1] == "50"
    assert words[words.index("--out") + 1] == str(tmp_path / "runs" / "torch_fp16-seed0-round0")


def test_unknown_recipe_is_named():
    with pytest.raises(ConfigError, match=r"config: 'configs/powresgd\.yaml' does not.*'powersgd'"):
        plan.choose([Path("configs/powresgd.yaml")], [])


def test_two_recipes_of_one_name_are_refused(tmp_path):
    (tmp_path / "sign.yaml").write_text("scheme: {name: sign}")
    with pytest.raises(ConfigError, match=r"would both be called 'sign'; rename"):
        plan.choose([CONFIGS / "sign.yaml", tmp_path / "sign.yaml"], [])


@pytest.mark.parametrize("hook", ["torch:powresgd", "powersgd"])
def test_unknown_hooks_are_named(hook):
    with pytest.raises(ConfigError, match=rf"{hook}.*torch:powersgd"):
        plan.choose([], [hook])


def test_bad_settings_are_found_before_anything_runs(tmp_path):
    trials = plan.order(plan.choose([], []), 1, 1, tmp_path)
    plan.check(trials, 10, ["model.width=32"])
    with pytest.raises(ConfigError, match=r"ddp\.yaml: model\.wdith: unknown field.*'width'"):
        plan.check(trials, 10, ["model.wdith=32"])


def test_a_limit_of_time_is_a_setting_of_every_run():
    assert plan.limits(None) == ()
    trials = plan.order(plan.choose([], []), 1, 1, Path("out"))
    plan.check(trials, 5, plan.limits(90))
    with pytest.raises(ConfigError, match="max_seconds"):
        plan.check(trials, 5, plan.limits(-1))

"""Configuration: strict, with the dotted path of what is wrong and the name that was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
import pytest

from commkit.compressors import Sign
from commkit.config import ConfigError, apply_overrides, build, load_yaml, validate
from commkit.optim import OptimizerScheme
from commkit.outer import AsyncScheme, OuterScheme
from commkit.reducer import Reducer
from commkit.registry import names
from commkit.schemes import make_reducer, make_scheme
from commkit.sharded import PartitionScheme, ShardedScheme
from commkit.straggler import StragglerScheme

CONFIGS = Path(__file__).parents[1] / "configs"
WITHOUT_RECIPE = {"compose", "dadao"}  # made of parts; a solver


def _load(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load_yaml(path)


def test_yaml_reads_exponents_as_numbers(tmp_path: Path) -> None:
    assert _load(tmp_path, "{a: 1e-3, b: 2E5, c: -1.5e+2, d: 1e, e: 0.5}") == {
        "a": 1e-3,
        "b": 2e5,
        "c": -150.0,
        "d": "1e",
        "e": 0.5,
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2\n", ["'a' is given twice", "line 2"]),
        ("scheme: {rank: 1, rank: 2}\n", ["'rank' is given twice"]),
        ("- 1\n", ["must be a mapping"]),
        ("a: [1\n", ["not valid YAML"]),
    ],
)
def test_bad_yaml_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, text)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path / "none.yaml")


def test_overrides_change_a_copy() -> None:
    data = {"a": {"b": 1}, "c": 2}
    changed = apply_overrides(data, ["a.b=1e-2", "a.d.e=[1, x]", "c=null"])
    assert changed == {"a": {"b": 0.01, "d": {"e": [1, "x"]}}, "c": None}
    assert data == {"a": {"b": 1}, "c": 2}


@pytest.mark.parametrize("override", ["a", "a..b=1", "=1", "c.d=1"])
def test_bad_overrides_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        apply_overrides({"c": 2}, [override])


class _Inner(pydantic.BaseModel, extra="forbid", strict=True):
    length: int = 3
    size: float


class _Outer(pydantic.BaseModel, extra="forbid", strict=True):
    inner: _Inner
    name: str = "x"


def test_validate_reports_every_fault_with_its_path() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(_Outer, {"inner": {"lenght": 4}, "name": 5}, "here.yaml")
    message = str(caught.value)
    for word in (
        "here.yaml:",
        "inner.lenght: unknown field, did you mean 'length'?",
        "inner.size is missing",
        "name=5",
    ):
        assert word in message


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ("signn", ["scheme.name", "'signn'", "did you mean 'sign'?"]),
        ({"rank": 4}, ["scheme must be a name or a mapping with a 'name'"]),
        ({"name": "powersgd", "rnak": 4}, ["scheme.rnak", "did you mean 'rank'?"]),
        ({"name": "powersgd", "rank": "4"}, ["scheme.rank='4'", "valid integer"]),
        ({"name": "powersgd", "rank": True}, ["scheme.rank=True"]),
        ({"name": "powersgd", "rank": 0}, ["scheme: rank=0 must be >= 1"]),
        ({"name": "topk", "density": 0.0}, ["density=0.0", "(0, 1]"]),
        ({"name": "topk", "density": 1.5}, ["density=1.5"]),
        ({"name": "topk", "values": "fp64"}, ["scheme.values='fp64'", "'fp32'"]),
        ({"name": "int8", "block_size": 3}, ["block_size=3", "even"]),
        ({"name": "sign", "start_step": -1}, ["start_step=-1 must be >= 0"]),
        ({"name": "sign", "seed": "x"}, ["scheme.seed='x'", "integer"]),
        ({"name": "powersgd", "rank": [[0, "4"]]}, ["scheme.rank=[[0, '4']]", "integer"]),
        ({"name": "powersgd", "iteration": "both"}, ["scheme.iteration='both'", "'two_sided'"]),
        ({"name": "hierarchical"}, ["scheme.scheme is missing"]),
        (
            {"name": "hierarchical", "scheme": {"name": "powersgd", "rnak": 4}},
            ["scheme.scheme.rnak", "did you mean 'rank'?"],
        ),
        ({"name": "hierarchical", "scheme": "signn"}, ["scheme.scheme.name", "'sign'"]),
        ({"name": "hierarchical", "scheme": "ddp"}, ["nothing would go by nodes"]),
        (
            {"name": "hierarchical", "scheme": "sign", "local_size": 0},
            ["local_size=0 must be >= 1"],
        ),
        ({"name": "compose"}, ["scheme.aggregator is missing"]),
        (
            {"name": "compose", "aggregator": {"name": "two_shot"}},
            ["scheme.aggregator.compressor is missing"],
        ),
        (
            {
                "name": "compose",
                "aggregator": {
                    "name": "all_gather",
                    "compressor": {"name": "block_quantize", "bits": 5},
                },
            },
            ["scheme.aggregator.compressor.bits=5"],
        ),
        (
            {"name": "compose", "aggregator": "noop", "policy": {"start": 3}},
            ["scheme.policy.start", "did you mean 'start_step'?"],
        ),
    ],
)
def test_bad_schemes_are_refused(block: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_reducer(block)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("compressor", ["sign", "topk", "block_quantize", "ternary"])
def test_payloads_that_cannot_be_summed_are_a_type_error(compressor: str) -> None:
    block = {"name": "compose", "aggregator": {"name": "all_reduce", "compressor": compressor}}
    with pytest.raises(TypeError, match=r"scheme\.aggregator: all_reduce cannot add up"):
        make_reducer(block)


def test_composition_from_yaml_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        """
        scheme:
          name: compose
          seed: 3
          aggregator:
            name: two_shot
            compressor: {name: sign, scale: rms}
            server_feedback: error_feedback
            granule: 512
          feedback: {name: error_feedback}
          policy: {start_step: 10, exclude: ["*embed*"]}
          max_grad_norm: 1.5
        """
    )
    spec = make_reducer(path).spec()
    assert spec == {
        "aggregator": {
            "name": "two_shot",
            "compressor": {"name": "sign", "scale": "rms"},
            "server_feedback": {"name": "error_feedback", "decay": 1.0},
            "granule": 512,
        },
        "feedback": {"name": "error_feedback", "decay": 1.0},
        "policy": {"start_step": 10, "min_numel": 1024, "min_ndim": 0, "exclude": ["*embed*"]},
        "seed": 3,
        "max_grad_norm": 1.5,
    }
    again = dict(spec, name="compose")
    assert make_reducer(again).spec() == spec, "a spec builds what it describes"


def test_a_reducer_is_taken_as_it_is() -> None:
    reducer = make_reducer("powersgd", {"rank": 2})
    assert make_reducer(reducer) is reducer
    with pytest.raises(TypeError, match="no effect"):
        make_reducer(reducer, {"rank": 3})


@pytest.mark.parametrize("name", [n for n in names("scheme") if n not in WITHOUT_RECIPE])
def test_every_scheme_has_a_recipe_of_its_name(name: str) -> None:
    block = load_yaml(CONFIGS / f"{name}.yaml")["scheme"]
    assert block["name"] == name
    made = make_scheme(CONFIGS / f"{name}.yaml")
    kinds = (
        Reducer
        | OptimizerScheme
        | OuterScheme
        | AsyncScheme
        | StragglerScheme
        | ShardedScheme
        | PartitionScheme
    )
    assert isinstance(made, kinds)


def test_every_recipe_is_a_scheme() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(names("scheme")) - WITHOUT_RECIPE


def test_parts_are_their_own_configuration() -> None:
    assert build("compressor", {"name": "sign", "scale": "rms"}, "c") == Sign("rms")

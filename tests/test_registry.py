"""Names for parts: registering, looking up, and reading a part back as plain data."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from commkit import registry, schemes
from commkit.aggregators import PowerSGD, TwoShot
from commkit.compressors import Sign, TopK
from commkit.config import build
from commkit.feedback import ErrorFeedback
from commkit.optim import OptimizerScheme
from commkit.policy import Policy
from commkit.registry import UnknownNameError


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations of a test are forgotten after it."""
    copies = {kind: dict(known) for kind, known in registry._factories.items()}
    monkeypatch.setattr(registry, "_factories", copies)


@pytest.mark.usefixtures("scratch")
def test_a_decorator_is_all_it_takes() -> None:
    @registry.register("compressor", "halve")
    @dataclass(frozen=True)
    class Halve:
        factor: float = 0.5

    assert registry.lookup("compressor", "halve") is Halve
    assert "halve" in registry.names("compressor")
    assert "halve" not in registry.names("aggregator")
    assert build("compressor", {"name": "halve", "factor": 0.25}, "x") == Halve(0.25)
    assert registry.spec(Halve()) == {"name": "halve", "factor": 0.5}


@pytest.mark.usefixtures("scratch")
def test_a_name_cannot_be_taken_twice() -> None:
    with pytest.raises(ValueError, match="compressor 'sign' is registered twice"):
        registry.register("compressor", "sign")(lambda: None)
    registry.register("feedback", "sign")(lambda: None)  # another kind


def test_unknown_names_get_a_hint_and_the_list() -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown scheme 'powersdg', did you mean 'powersgd'"
    ):
        registry.lookup("scheme", "powersdg")
    with pytest.raises(UnknownNameError) as error:
        registry.lookup("scheme", "qqqqqq")
    assert "did you mean" not in str(error.value)
    assert all(name in str(error.value) for name in registry.names("scheme"))


def test_names_are_sorted_and_include_what_lives_in_the_packages() -> None:
    for kind, some in {
        "compressor": {"none", "cast", "block_quantize", "sign", "ternary", "topk", "randomk"},
        "feedback": {"none", "error_feedback"},
        "aggregator": {"all_reduce", "all_gather", "two_shot", "powersgd", "noop"},
        "scheme": {"ddp", "noop", "fp16", "bf16", "int8", "int4", "sign", "topk", "powersgd"},
    }.items():
        names = registry.names(kind)
        assert names == sorted(names)
        assert some <= set(names)


def test_every_scheme_that_needs_no_part_builds_by_name() -> None:
    for name in set(registry.names("scheme")) - {"compose"}:
        first, second = (schemes.make_scheme(name) for _ in range(2))
        assert first is not second
        if isinstance(first, OptimizerScheme):
            assert first == second
            continue
        assert first.aggregator is not second.aggregator
        assert first.spec() == second.spec()


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("compressor", TopK(0.25, "exact", "bf16")),
        ("compressor", Sign("rms")),
        ("aggregator", TwoShot(Sign(), ErrorFeedback(), 64)),
        ("aggregator", PowerSGD(7, 1.5, False)),
        ("feedback", ErrorFeedback()),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_a_spec_is_json_that_builds_the_part_again(kind, part) -> None:
    spec = registry.spec(part)
    again = build(kind, json.loads(json.dumps(spec)), "part")
    assert type(again) is type(part)
    assert registry.spec(again) == spec


def test_spec_of_a_part_without_a_name_is_its_fields() -> None:
    assert registry.spec(Policy(5, exclude=["a", "b"])) == {
        "start_step": 5,
        "min_numel": 1024,
        "min_ndim": 0,
        "exclude": ["a", "b"],
    }

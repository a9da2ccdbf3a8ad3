"""What is wrong is said on every rank, before anybody waits for anybody."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from commkit.adapters.deepspeed.library import (
    DeepSpeedVersionError,
    require_method,
    require_version,
)

from ..adapters import problem
from . import world

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.timeout(300)
ONEBIT = {"name": "onebit_adam", "freeze_step": 10}


def _refused(
    block: Any, stage: int = 0, sgd: bool = True, pairs: Any = (), **changes: Any
) -> Callable[[int], str]:
    """What ``initialize`` says to a config."""

    def attempt(rank: int) -> str:
        net = problem.model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1) if sgd else None
        extra = {} if block is None else {"commkit": block}
        config = world.config(stage, **extra, **changes)
        return world.refusal(lambda: world.engine_of(net, config, optimizer))

    return attempt


# Name: attempt, and what the error begins with or contains.
REFUSED: dict[str, tuple[Callable[[int], str], tuple[str, ...]]] = {
    "unknown key of the block": (
        _refused({"scheme": "sign", "sheme": 1}),
        ("ConfigError", "sheme: unknown field, did you mean 'scheme'?"),
    ),
    "unknown scheme": (
        _refused({"scheme": "powerscd"}),
        ("ConfigError: commkit.scheme.name", "did you mean 'powersgd'?"),
    ),
    "unknown field": (
        _refused({"scheme": {"name": "powersgd", "rnk": 4}}),
        ("ConfigError: commkit.scheme.rnk", "did you mean 'rank'?"),
    ),
    "out of range": (
        _refused({"scheme": {"name": "powersgd", "rank": 0}}),
        ("ConfigError: commkit.scheme",),
    ),
    "wrong type": (
        _refused({"scheme": "sign", "timeout_s": "long"}),
        ("ConfigError", "timeout_s='long'"),
    ),
    "scheme missing": (_refused({}), ("ConfigError", "scheme is missing")),
    "an optimizer with ZeRO": (
        _refused({"scheme": ONEBIT}, stage=1, sgd=False),
        ("ConfigError", "zero_optimization.stage=1 must be 0"),
    ),
    "local updates with ZeRO": (
        _refused({"scheme": "diloco"}, stage=3),
        ("ConfigError", "zero_optimization.stage=3 must be 0"),
    ),
    "a former optimizer with ZeRO": (
        _refused(None, stage=1, sgd=False, optimizer={"type": "OneBitAdam", "params": {}}),
        ("ConfigError", "zero_optimization.stage=1 must be 0"),
    ),
    "two optimizers": (
        _refused({"scheme": ONEBIT}, sgd=False, optimizer={"type": "AdamW", "params": {}}),
        ("ConfigError", "is an optimizer itself", "'AdamW'"),
    ),
    "an optimizer and one given": (
        _refused({"scheme": ONEBIT}),
        ("ConfigError", "initialize(optimizer=SGD)"),
    ),
    "a former optimizer and a scheme": (
        _refused({"scheme": "sign"}, sgd=False, optimizer={"type": "ZeroOneAdam", "params": {}}),
        ("ConfigError", "leave one of them out"),
    ),
    "no optimizer": (_refused({"scheme": "sign"}, sgd=False), ("ConfigError: no optimizer",)),
    "settings of an optimizer for a reducer": (
        _refused({"scheme": "sign", "optimizer": {"lr": 0.1}}),
        ("ConfigError: commkit.optimizer",),
    ),
    "unknown setting": (
        _refused({"scheme": ONEBIT, "optimizer": {"weigth_decay": 0.1}}, sgd=False),
        ("ConfigError: commkit.optimizer.weigth_decay", "did you mean 'weight_decay'?"),
    ),
    "setting out of range": (
        _refused({"scheme": ONEBIT, "optimizer": {"lr": -1.0}}, sgd=False),
        ("ConfigError: commkit.optimizer", "lr=-1.0"),
    ),
    "clipped twice": (
        _refused({"scheme": {**ONEBIT, "max_grad_norm": 1.0}}, sgd=False, gradient_clipping=1.0),
        ("ConfigError", "both clip"),
    ),
    "a scheme for FSDP": (_refused({"scheme": "qsdp"}), ("ConfigError", "is not for DeepSpeed")),
    "a method that needs a closure": (
        _refused({"scheme": "dfedsam_mgs"}),
        ("ConfigError", "evaluates every batch twice"),
    ),
    "gradients one by one": (
        _refused({"scheme": "sign"}, stage=2, zero_optimization={"contiguous_gradients": False}),
        ("ConfigError: zero_optimization.contiguous_gradients",),
    ),
    "another dtype to send": (
        _refused({"scheme": "sign"}, communication_data_type="bf16"),
        ("ValueError", "communication_data_type"),
    ),
    "momentum twice": (
        _refused(
            {
                "scheme": {
                    "name": "compose",
                    "aggregator": {"name": "all_gather", "compressor": "topk"},
                    "feedback": {"name": "momentum_correction", "momentum": 0.9},
                }
            },
            sgd=False,
            optimizer={"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
        ),
        ("ValueError", "momentum twice"),
    ),
    "a rank that no matrix has": (
        _refused({"scheme": {"name": "powersgd", "rank": 500}}, stage=1),
        ("ValueError", "rank"),
    ),
}


def every_refusal(rank: int) -> dict[str, str]:
    return {name: attempt(rank) for name, (attempt, _) in REFUSED.items()}


def on_one_rank_only(rank: int) -> str:
    """Rank 1 has another config; both hear of it."""
    block = {"scheme": {"name": "powersgd", "rank": 2 + rank}}
    return _refused(block)(rank)


def wrong_on_one_rank(rank: int) -> str:
    return _refused({"scheme": "sign" if rank == 0 else "sing"})(rank)


def twice(rank: int) -> str:
    import commkit.deepspeed

    net = problem.model()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    engine = world.engine_of(net, world.config(commkit={"scheme": "sign"}), sgd)
    return world.refusal(lambda: commkit.deepspeed.attach(engine, "sign"))


def by_arguments(rank: int) -> tuple[bool, str, str]:
    """The config as a file, in ``args`` as with DeepSpeed's launcher, and in both places."""
    config = world.config(commkit={"scheme": "sign"})
    path = Path(tempfile.mkdtemp()) / "ds_config.json"
    path.write_text(json.dumps(config))
    args = SimpleNamespace(local_rank=rank, deepspeed_config=str(path))

    def build(ds_config: Any) -> Any:
        net = problem.model()
        return world.engine_of(net, ds_config, torch.optim.SGD(net.parameters(), lr=0.1), args=args)

    attached = hasattr(build(None), "commkit")
    return attached, args.deepspeed_config, world.refusal(lambda: build(str(path)))


@pytest.fixture(scope="module")
def outcomes() -> world.Outcomes:
    return world.Outcomes(
        2, every_refusal, on_one_rank_only, wrong_on_one_rank, twice, by_arguments
    )


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_on_every_rank_with_its_reason(outcomes, name):
    for told in outcomes.of(every_refusal):
        for part in REFUSED[name][1]:
            assert part in told[name]


def test_ranks_that_differ(outcomes):
    for told in outcomes.of(on_one_rank_only):
        assert "ranks disagree on commkit.scheme.rank: rank 0 has 2, rank 1 has 3" in told


def test_one_rank_is_wrong_and_both_are_told(outcomes):
    first, second = outcomes.of(wrong_on_one_rank)
    assert "rank 1 refused to attach" in first
    assert "did you mean 'sign'?" in first
    assert second.startswith("ConfigError")


def test_attached_twice(outcomes):
    for told in outcomes.of(twice):
        assert told.startswith("RuntimeError: the model is attached already")


def test_the_config_may_be_in_the_arguments_but_not_twice(outcomes):
    for attached, left, refused in outcomes.of(by_arguments):
        assert attached
        assert left.endswith("ds_config.json")
        assert refused.startswith("ConfigError: a ds_config was given as an argument")


@pytest.mark.parametrize("version", ["0.18.9", "0.20.0", "1.0", "unknown"])
def test_other_versions_of_deepspeed(version):
    with pytest.raises(DeepSpeedVersionError, match=r"deepspeed>=0.19,<0.20"):
        require_version(version)


def test_this_version():
    require_version("0.19.8+cpu")


def test_without_deepspeed(monkeypatch):
    import commkit.deepspeed

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'commkit\[deepspeed\]'"):
        commkit.deepspeed.initialize(model=problem.model(), config=world.config())


def test_a_private_method_that_has_changed():
    class Engine:
        def reduce(self, bucket: Any) -> None:
            pass

    assert require_method(Engine(), "reduce", ("bucket",))
    with pytest.raises(DeepSpeedVersionError, match=r"Engine\.reduce takes \('bucket',\)"):
        require_method(Engine(), "reduce", ("bucket", "group"))
    with pytest.raises(DeepSpeedVersionError, match=r"Engine\.gather is missing"):
        require_method(Engine(), "gather", ())

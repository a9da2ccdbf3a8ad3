"""fp16 with a dynamic loss scale: a step that overflows on one rank is skipped on all and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ..adapters import problem
from . import world

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.timeout(300)
FP16 = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2, "hysteresis": 1}


def _engine(stage: int, accumulate: int = 1, **changes: Any) -> Any:
    net = problem.model()
    optimizer = None
    if "commkit" in changes and changes["commkit"]["scheme"] == "sign":
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    config = world.config(stage, gradient_accumulation_steps=accumulate, fp16=FP16, **changes)
    return world.engine_of(net, config, optimizer)


def _state(engine: Any) -> dict[str, torch.Tensor]:
    state = engine.commkit.reducer.state_dict()
    return {key: x.clone() for key, x in state.items() if key != "shared/step"}


def _around_an_overflow(rank: int, engine: Any, accumulate: int = 1) -> dict[str, Any]:
    """Steps before, one whose last micro-batch overflows on rank 1, and steps after."""
    before = world.train(engine, range(6), rank, accumulate)
    weights, state = world.weights(engine), _state(engine)
    for micro in range(accumulate):
        last = micro == accumulate - 1
        engine.backward(world.loss_of(engine, 50 + micro, rank, spoil=last and rank == 1))
        engine.step()
    untouched = {key: torch.equal(x, state[key]) for key, x in _state(engine).items()}
    same_weights = torch.equal(world.weights(engine), weights)
    after = world.train(engine, range(6, 12), rank, accumulate)
    return {
        "skipped": engine.skipped_steps,
        "untouched": all(untouched.values()) and untouched.keys() == state.keys() and bool(state),
        "same weights": same_weights,
        "learns": sum(after[-3:]) < sum(before[:3]),
        "equal": problem.replicas_equal(engine.module)
        if engine.zero_optimization_stage() < 3
        else True,
    }


def reducers(rank: int) -> dict[str, Any]:
    world.allow_fp16()
    told = {}
    for stage, accumulate in ((0, 1), (1, 1), (2, 1), (3, 1), (2, 2), (3, 2)):
        engine = _engine(stage, accumulate, commkit={"scheme": "sign"})
        told[f"stage {stage}, {accumulate}"] = _around_an_overflow(rank, engine, accumulate)
    return told


def optimizers(rank: int) -> dict[str, Any]:
    """From the first compressed step on; the one whose ranks step alone overflows while they do."""
    world.allow_fp16()
    schemes: dict[str, dict[str, Any]] = {
        "onebit_adam": {"freeze_step": 3},
        "onebit_lamb": {"freeze_step": 3},
        "zero_one_adam": {"var_freeze_step": 3, "local_step_scaler": 2, "local_step_clipper": 4},
        "dgc": {"density": 0.05},
        "demo": {"top_k": 64},
    }
    told = {}
    for name, knobs in schemes.items():
        lr = {"dgc": 0.02, "onebit_lamb": 0.02}.get(name, 2e-3)
        block = {"scheme": {"name": name, **knobs}, "optimizer": {"lr": lr}}
        told[name] = _around_an_overflow(rank, _engine(0, commkit=block))
        if name == "zero_one_adam":
            told[name]["equal"] = True  # they step alone at the end
    return told


def the_documented_configs(rank: int) -> dict[str, Any]:
    """DeepSpeed's tutorials on 1-bit Adam, 0/1 Adam and 1-bit LAMB, with fewer steps and samples."""
    world.allow_fp16()
    common = {"cuda_aware": False, "comm_backend_name": "nccl"}
    blocks = {
        "OneBitAdam": {"lr": 4e-4, "freeze_step": 4},
        "ZeroOneAdam": {
            "lr": 1e-3,
            "weight_decay": 0.01,
            "bias_correction": False,
            "var_freeze_step": 4,
            "var_update_scaler": 16,
            "local_step_scaler": 4,
            "local_step_clipper": 16,
        },
        "OneBitLamb": {
            "lr": 11e-3,
            "max_coeff": 0.3,
            "min_coeff": 0.01,
            "freeze_step": 4,
            "coeff_beta": 0.9,
            "factor_max": 4.0,
            "factor_min": 0.5,
            "factor_threshold": 0.1,
        },
    }
    told = {}
    for kind, params in blocks.items():
        config = {
            "train_batch_size": 64,
            "train_micro_batch_size_per_gpu": 16,
            "optimizer": {"type": kind, "params": {**params, **common}},
            "gradient_clipping": 1.0,
            "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 8},
            "scheduler": {
                "type": "WarmupLR",
                "params": {"warmup_max_lr": params["lr"], "warmup_num_steps": 2},
            },
        }
        engine = world.engine_of(problem.model(), config)
        losses = world.train(engine, range(20), rank, accumulate=2)
        told[kind] = (sum(losses[:4]) / 4, sum(losses[-4:]) / 4, engine.get_lr()[0] == params["lr"])
    return told


@pytest.fixture(scope="module")
def outcomes() -> world.Outcomes:
    return world.Outcomes(2, reducers, optimizers, the_documented_configs)


@pytest.mark.parametrize("case", [reducers, optimizers])
def test_nobody_steps_and_nothing_is_kept_of_a_step_that_overflows_on_one_rank(outcomes, case):
    for told in outcomes.of(case):
        for name, facts in told.items():
            wrong = [what for what, holds in facts.items() if not holds]
            assert not wrong, (name, facts)
            assert facts["skipped"] == 1, (name, facts)


def test_the_configs_of_deepspeeds_tutorials_train_as_they_stand(outcomes):
    for told in outcomes.of(the_documented_configs):
        for kind, (first, last, scheduled) in told.items():
            assert last < 0.9 * first, kind
            assert scheduled, kind

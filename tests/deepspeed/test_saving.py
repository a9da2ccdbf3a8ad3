"""``engine.save_checkpoint`` and ``load_checkpoint`` with the scheme's state."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ..adapters import problem
from . import world

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.timeout(300)
BEFORE, AFTER = range(5), range(5, 10)
SIGN = {"scheme": "sign"}
ZERO_ONE = {"name": "zero_one_adam", "var_freeze_step": 2, "local_step_scaler": 1}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    **{f"sign at stage {stage}": (stage, SIGN, {}) for stage in range(4)},
    "powersgd": (1, {"scheme": {"name": "powersgd", "rank": 2}}, {}),
    "onebit_adam": (
        0,
        {"scheme": {"name": "onebit_adam", "freeze_step": 3}, "optimizer": {"lr": 2e-3}},
        {},
    ),
    "onebit_adam in bf16": (
        0,
        {"scheme": {"name": "onebit_adam", "freeze_step": 3}, "optimizer": {"lr": 2e-3}},
        {"bf16": {"enabled": True}},
    ),
    "zero_one_adam between synchronisations, in bf16": (
        0,
        {"scheme": ZERO_ONE, "optimizer": {"lr": 2e-3}},
        {"bf16": {"enabled": True}},
    ),
    "diloco inside a round": (0, {"scheme": {"name": "diloco", "sync_every": 4}}, {}),
    "diloco inside a round, in bf16": (
        0,
        {"scheme": {"name": "diloco", "sync_every": 4}},
        {"bf16": {"enabled": True}},
    ),
}


def _engine(stage: int, block: dict[str, Any], changes: dict[str, Any], seed: int = 0) -> Any:
    net = problem.model(seed)
    optimizer = None
    if "optimizer" not in block:
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    return world.engine_of(net, world.config(stage, commkit=block, **changes), optimizer)


def _shared_directory(rank: int) -> str:
    told = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(told, src=0)
    assert told[0] is not None
    return told[0]


def resumed(rank: int) -> dict[str, bool]:
    """A run that was saved and loaded goes on as if it had not been."""
    same = {}
    for name, (stage, block, changes) in CASES.items():
        directory = _shared_directory(rank)
        engine = _engine(stage, block, changes)
        world.train(engine, BEFORE, rank)
        engine.save_checkpoint(directory)
        losses, weights = world.train(engine, AFTER, rank), world.weights(engine)
        engine.commkit.close()
        other = _engine(stage, block, changes, seed=1)
        path, _ = other.load_checkpoint(directory)
        mine, reached = world.train(other, AFTER, rank), world.weights(other)
        other.commkit.close()
        same[name] = path is not None and mine == losses and torch.equal(reached, weights)
    return same


def without_state(rank: int) -> tuple[str, bool, bool]:
    """A checkpoint of a run without commkit."""
    directory = _shared_directory(rank)
    net = problem.model()
    engine = world.engine_of(net, world.config(), torch.optim.SGD(net.parameters(), lr=0.1))
    engine.save_checkpoint(directory, tag="dense")
    strict = _engine(0, SIGN, {})
    refused = world.refusal(lambda: strict.load_checkpoint(directory))
    fresh = _engine(0, {**SIGN, "missing_state": "fresh"}, {})
    loaded, _ = fresh.load_checkpoint(directory)
    only, _ = strict.load_checkpoint(directory, load_module_only=True)
    return refused, loaded is not None, only is not None


def saved_by_two(rank: int, directory: str) -> dict[str, torch.Tensor]:
    engine = _engine(0, SIGN, {})
    world.train(engine, BEFORE, rank)
    engine.save_checkpoint(directory, tag="two")
    return {k: x for k, x in engine.commkit.reducer.state_dict().items() if k.startswith("rank/")}


def loaded_by_one(rank: int, directory: str) -> tuple[dict[str, torch.Tensor], str]:
    engine = _engine(0, SIGN, {})
    engine.load_checkpoint(directory)
    state = engine.commkit.reducer.state_dict()
    strict = _engine(0, {**SIGN, "on_world_size_change": "error"}, {})
    refused = world.refusal(lambda: strict.load_checkpoint(directory))
    return {k: x for k, x in state.items() if k.startswith("rank/")}, refused


@pytest.fixture(scope="module")
def outcomes() -> world.Outcomes:
    return world.Outcomes(2, resumed, without_state)


def test_a_resumed_run_goes_on_bit_for_bit(outcomes):
    for same in outcomes.of(resumed):
        assert not [name for name, equal in same.items() if not equal]


def test_a_checkpoint_without_state_is_refused_unless_that_is_wanted(outcomes):
    for refused, fresh, only in outcomes.of(without_state):
        assert refused.startswith("CheckpointError: no state of commkit's scheme at")
        assert '"missing_state": "fresh"' in refused
        assert fresh
        assert only


def test_another_number_of_ranks_starts_from_the_mean_residual(tmp_path: Path):
    two = world.Outcomes(2, saved_by_two, arguments=(str(tmp_path),)).of(saved_by_two)
    one = world.Outcomes(1, loaded_by_one, arguments=(str(tmp_path),)).of(loaded_by_one)
    state, refused = one[0]
    assert state.keys() == two[0].keys()
    assert state
    for key, x in state.items():
        assert torch.equal(x, two[0][key] / 2 + two[1][key] / 2)
    assert refused.startswith("CheckpointError:")
    assert "was saved by 2 ranks" in refused

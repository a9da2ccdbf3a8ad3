"""Two pipeline stages of two data-parallel ranks each."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ..adapters import problem
from . import world

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.timeout(300)
STEPS = 6
ONEBIT = {"scheme": {"name": "onebit_adam", "freeze_step": 2}, "optimizer": {"lr": 2e-3}}


def _engine(stage: int, block: Any, seed: int = 0, **changes: Any) -> Any:
    from deepspeed.pipe import PipelineModule

    net = PipelineModule(
        list(problem.model(seed).children()), num_stages=2, loss_fn=nn.functional.mse_loss
    )
    optimizer = None
    if block is None or "optimizer" not in block:
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    extra = {} if block is None else {"commkit": block}
    config = world.config(stage, gradient_accumulation_steps=2, **extra, **changes)
    return world.engine_of(net, config, optimizer)


def _batches(engine: Any, first: int) -> Iterator[Any]:
    step = first
    while True:
        yield problem.batch(step, engine.mpu.get_data_parallel_rank())
        step += 1


def _train(engine: Any, steps: range) -> list[float]:
    return [float(engine.train_batch(_batches(engine, 2 * step))) for step in steps]


def against_deepspeed(rank: int) -> dict[str, bool]:
    """Without compression nothing differs from DeepSpeed itself."""
    same = {}
    for stage in (0, 1):
        clip = {"gradient_clipping": 0.05}
        plain = _train(_engine(stage, None, **clip), range(STEPS))
        engine = _engine(stage, {"scheme": "ddp"}, **clip)
        same[f"stage {stage}"] = _train(engine, range(STEPS)) == plain
    return same


def compressed(rank: int) -> dict[str, bool]:
    facts = {}
    for name, stage, block in (
        ("sign", 0, {"scheme": "sign"}),
        ("sign, ZeRO", 1, {"scheme": "sign"}),
        ("onebit_adam", 0, ONEBIT),
    ):
        engine = _engine(stage, block)
        losses = _train(engine, range(20))
        facts[f"{name} learns"] = losses[-1] < 0.9 * losses[0]
        group = engine.mpu.get_data_parallel_group()
        facts[f"{name}, equal replicas"] = problem.replicas_equal(engine.module, group)
        facts[f"{name} compresses"] = 0 < engine.commkit.last_step.payload_bytes < 20_000
    return facts


def resumed(rank: int) -> dict[str, bool]:
    same = {}
    for name, block in (("sign", {"scheme": "sign"}), ("onebit_adam", ONEBIT)):
        told = [tempfile.mkdtemp() if rank == 0 else None]
        dist.broadcast_object_list(told, src=0)
        engine = _engine(0, block)
        _train(engine, range(STEPS))
        engine.save_checkpoint(told[0])
        losses = _train(engine, range(STEPS, 2 * STEPS))
        other = _engine(0, block, seed=1)
        other.load_checkpoint(told[0])
        same[name] = _train(other, range(STEPS, 2 * STEPS)) == losses
    return same


def overflow_in_one_stage(rank: int) -> dict[str, bool]:
    """The other stage's residuals are left alone too: no stage steps."""
    world.allow_fp16()
    fp16 = {"enabled": True, "initial_scale_power": 4}
    engine = _engine(0, {"scheme": "sign"}, fp16=fp16)

    def batches(first: int) -> Iterator[Any]:
        for x, y in _batches(engine, first):
            yield x.half(), y.half()

    for step in range(3):
        engine.train_batch(batches(2 * step))
    before = {
        k: x.clone()
        for k, x in engine.commkit.reducer.state_dict().items()
        if k.startswith("rank/")
    }
    poisoned = engine.is_last_stage() and engine.mpu.get_data_parallel_rank() == 1
    last = [p for p in engine.module.parameters() if p.requires_grad][-1]
    hook = last.register_hook(lambda g: g * torch.inf if poisoned else g)
    engine.train_batch(batches(100))
    hook.remove()
    after = engine.commkit.reducer.state_dict()
    return {
        "skipped": engine.skipped_steps == 1,
        "untouched": bool(before) and all(torch.equal(after[k], x) for k, x in before.items()),
    }


def refused(rank: int) -> list[str]:
    clipping = {"scheme": {"name": "powersgd", "rank": 2, "max_grad_norm": 1.0}}
    return [
        world.refusal(lambda: _engine(0, {"scheme": "diloco"})),
        world.refusal(lambda: _engine(0, clipping)),
    ]


@pytest.fixture(scope="module")
def outcomes() -> world.Outcomes:
    return world.Outcomes(4, against_deepspeed, compressed, resumed, overflow_in_one_stage, refused)


@pytest.mark.parametrize("case", [against_deepspeed, compressed, resumed, overflow_in_one_stage])
def test_stages_and_replicas(outcomes, case):
    for facts in outcomes.of(case):
        assert not [name for name, holds in facts.items() if not holds]


def test_what_needs_the_whole_model_is_refused(outcomes):
    for local_updates, clipping in outcomes.of(refused):
        assert local_updates.startswith("ValueError: DiLoCo decides on whole models")
        assert clipping.startswith("ValueError: the scheme clips by the norm of the whole")

"""Optimizers that communicate and local updates, as engines without averaging of their own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ..adapters import problem
from . import world

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.timeout(300)
STEPS = range(10)
OPTIMIZERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "onebit_adam": ({"freeze_step": 3}, {"lr": 2e-3, "betas": [0.9, 0.99], "weight_decay": 0.1}),
    "onebit_lamb": ({"freeze_step": 3}, {"lr": 2e-2, "weight_decay": 0.01}),
    "zero_one_adam": (
        {"var_freeze_step": 3, "local_step_scaler": 2, "local_step_clipper": 2},
        {"lr": 2e-3},
    ),
    "dgc": ({"density": 0.05}, {"lr": 0.05, "weight_decay": 1e-3}),
    "demo": ({"top_k": 64}, {"lr": 2e-3}),
}
DILOCO = {"name": "diloco", "sync_every": 3, "reducer": {"name": "int8"}}


def _loop(net: Any, optimizer: Any, rank: int) -> list[float]:
    """Without any wrapper; what communicates does so at the step."""
    return problem.train(net, STEPS, rank, optimizer=optimizer)


def _engine(name: str, knobs: Any, settings: Any, **changes: Any) -> Any:
    block = {"scheme": {"name": name, **knobs}, "optimizer": settings}
    return world.engine_of(problem.model(), world.config(commkit=block, **changes))


def against_attach(rank: int) -> dict[str, bool]:
    """The arithmetic is that of the optimizer without DeepSpeed: the same bits."""
    import commkit

    same = {}
    for name, (knobs, settings) in OPTIMIZERS.items():
        net = problem.model()
        tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        optimizer = commkit.schemes.make_scheme(name, knobs)(net.parameters(), **tuples)
        handle = commkit.attach(net, optimizer)
        losses = _loop(net, optimizer, rank)
        handle.close()
        engine = _engine(name, knobs, settings)
        mine = world.train(engine, STEPS, rank)
        reached = problem.parameters(engine.module)
        same[name] = mine == losses and torch.equal(reached, problem.parameters(net))
    return same


def given_as_an_object(rank: int) -> bool:
    """``initialize(optimizer=...)`` without a block."""
    import commkit

    knobs, settings = OPTIMIZERS["onebit_adam"]
    net = problem.model()
    optimizer = commkit.optim.OneBitAdam(
        net.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.1, freeze_step=3
    )
    losses = world.train(world.engine_of(net, world.config(), optimizer), STEPS, rank)
    return losses == world.train(_engine("onebit_adam", knobs, settings), STEPS, rank)


def clipped(rank: int) -> bool:
    """``gradient_clipping`` is the optimizer's, which clips the mean gradient of the warm-up as DDP's loop does."""
    knobs, settings = OPTIMIZERS["onebit_adam"]
    own = {**knobs, "max_grad_norm": 0.05, "clip": "gradient"}
    losses = world.train(_engine("onebit_adam", own, settings), STEPS, rank)
    engine = _engine("onebit_adam", knobs, settings, gradient_clipping=0.05)
    unclipped = world.train(_engine("onebit_adam", knobs, settings), STEPS, rank)
    return world.train(engine, STEPS, rank) == losses != unclipped


def in_bf16(rank: int) -> dict[str, tuple[bool, bool]]:
    """Weights of the model follow DeepSpeed's float32 ones, equal on all ranks."""
    told = {}
    for name, (knobs, settings) in OPTIMIZERS.items():
        engine = _engine(name, knobs, settings, bf16={"enabled": True})
        losses = world.train(engine, range(20), rank)
        bits = problem.replicas_equal(engine.module) or name == "zero_one_adam"
        told[name] = (bits, sum(losses[-4:]) < 0.9 * sum(losses[:4]))
    return told


def former_blocks(rank: int) -> dict[str, bool]:
    """A block of DeepSpeed's own former optimizer is the same as one of commkit's."""
    same = {}
    for kind, name in {"OneBitAdam": "onebit_adam", "OneBitLamb": "onebit_lamb"}.items():
        knobs, settings = OPTIMIZERS[name]
        params = {**knobs, **settings, "cuda_aware": False, "comm_backend_name": "nccl"}
        former = world.config(optimizer={"type": kind, "params": params})
        with _listening() as heard:
            engine = world.engine_of(problem.model(), former)
        noted = [name for name in ("cuda_aware", "comm_backend_name") if name in " ".join(heard)]
        same[f"{kind}: rank 0 says what is ignored"] = len(noted) == (2 if rank == 0 else 0)
        losses = world.train(engine, STEPS, rank)
        same[kind] = losses == world.train(_engine(name, knobs, settings), STEPS, rank)
        same[f"{kind} is left alone"] = former["optimizer"]["type"] == kind
    return same


@contextmanager
def _listening() -> Iterator[list[str]]:
    """What commkit logs inside the block."""
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("commkit")
    logger.addHandler(handler)
    try:
        yield heard
    finally:
        logger.removeHandler(handler)


def local_updates(rank: int) -> dict[str, bool]:
    """Around DeepSpeed's optimizer, and around the same loop without it."""
    import commkit

    same = {}
    for scheme in (
        DILOCO,
        {"name": "local_sgd", "sync_every": 3},
        {"name": "noloco", "sync_every": 3},
    ):
        name = scheme["name"]
        net = problem.model()
        inner = torch.optim.AdamW(net.parameters(), lr=1e-2)
        method = commkit.attach(net, scheme, inner)
        losses = _loop(net, inner, rank)
        method.close()
        engine = _with_local_updates(scheme)
        same[f"{name}, losses"] = world.train(engine, STEPS, rank) == losses
        same[f"{name}, alone inside a round"] = not problem.replicas_equal(engine.module)
        engine.commkit.finish()
        reached = problem.parameters(engine.module)
        same[f"{name}, weights"] = torch.equal(reached, problem.parameters(net))
        engine.commkit.close()
    engine = _with_local_updates(DILOCO, bf16={"enabled": True})
    world.train(engine, range(9), rank)
    same["bf16, at the end of a round"] = problem.replicas_equal(engine.module)
    engine.commkit.close()
    return same


def _with_local_updates(scheme: Any, **changes: Any) -> Any:
    net = problem.model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    return world.engine_of(net, world.config(commkit={"scheme": scheme}, **changes), optimizer)


@pytest.fixture(scope="module")
def outcomes() -> world.Outcomes:
    return world.Outcomes(
        2, against_attach, given_as_an_object, clipped, in_bf16, former_blocks, local_updates
    )


@pytest.mark.parametrize("case", [against_attach, former_blocks, local_updates])
def test_the_same_bits(outcomes, case):
    for same in outcomes.of(case):
        assert not [name for name, equal in same.items() if not equal]


def test_an_optimizer_that_is_built_already(outcomes):
    assert outcomes.of(given_as_an_object) == [True, True]


def test_deepspeeds_clipping_is_done_by_the_optimizer(outcomes):
    assert outcomes.of(clipped) == [True, True]


def test_bf16_learns_and_replicas_stay_equal(outcomes):
    for told in outcomes.of(in_bf16):
        assert not [name for name, facts in told.items() if facts != (True, True)], told

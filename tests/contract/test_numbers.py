"""Bad numbers on one rank, in the first, a middle and the last step: every registered scheme, one rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from commkit.reducer import Reducer
from commkit.schemes import make_scheme
from commkit.sim import ThreadComm, run_threads
from tests.named_schemes import OPTIMIZERS, OUTER, REDUCERS

from .scheme_cases import (
    OPTIMIZER_BLOCKS,
    SHAPES,
    UNLAWFUL,
    Tensors,
    built,
    copied,
    finish,
    gradients,
)

STEPS, BAD_RANK = 6, 1
BAD_STEPS = (0, 3, STEPS - 1)
FP16_MAX = 65504.0


def _set(value: float) -> Callable[[Tensors], None]:
    def spoil(grads: Tensors) -> None:
        grads["matrix"][5, 7] = value
        grads["vector"][11] = value

    return spoil


def _zero(grads: Tensors) -> None:
    for x in grads.values():
        x.zero_()


SPOILS = {
    "nan": _set(torch.nan),
    "inf": _set(-torch.inf),
    "fp16": _set(4 * FP16_MAX),
    "zero": _zero,
}
NON_FINITE = ("nan", "inf")
NAMED = sorted({*REDUCERS, *OPTIMIZERS, *OPTIMIZER_BLOCKS} - {*UNLAWFUL})


def _state(reducer: Reducer) -> Tensors:
    """All that is kept, but counters; an optimizer's weights and moments too."""
    state = copied(reducer.state_dict())
    del state["shared/step"]
    optimizer = getattr(reducer, "optimizer", None)
    if optimizer is not None:
        for name, p in optimizer._parameters.items():
            state[f"weight {name}"] = p.detach().clone()
            moments = {k: x for k, x in optimizer.state[p].items() if isinstance(x, Tensor)}
            state |= {f"{what} {name}": x.clone() for what, x in moments.items()}
    return state


def _finite(tensors: Tensors) -> bool:
    return all(bool(x.isfinite().all()) for x in tensors.values())


def _unchanged(before: Tensors, after: Tensors) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def bad_steps(comm: ThreadComm, name: str, kind: str) -> list[Tensors]:
    """Results of all steps, after the rules of this rank were checked."""
    reducer, seen = built(name), []
    for step in range(STEPS):
        grads = gradients(comm.rank, step)
        before = _state(reducer)
        if comm.rank == BAD_RANK and step in BAD_STEPS:
            SPOILS[kind](grads)
        outs = copied(reducer.reduce(grads, comm))
        finish(reducer, outs)
        after = _state(reducer)
        if step in BAD_STEPS and kind in NON_FINITE:
            # A gradient scaler has to see it, and nothing else may.
            assert not outs["matrix"][5, 7].isfinite()
            assert not outs["vector"][11].isfinite()
            assert outs["square"].isfinite().all()
            assert _unchanged(before, after)
        else:
            assert _finite(outs)
        assert _finite(after)
        seen.append(outs)
    return seen


@pytest.mark.parametrize("kind", SPOILS)
@pytest.mark.parametrize("name", NAMED)
def test_bad_steps(name: str, kind: str) -> None:
    first, other = run_threads(lambda comm: bad_steps(comm, name, kind), 2)
    if name == "zero_one_adam":  # whose steps are mostly each rank's own
        return
    for step, (mine, theirs) in enumerate(zip(first, other, strict=True)):
        for key in SHAPES:
            same = torch.equal(mine[key].nan_to_num(9.0), theirs[key].nan_to_num(9.0))
            assert same, (key, step)


def _net() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return net


_SOON: dict[str, Any] = {"sync_every": 2}
_KNOBS: dict[str, dict[str, Any]] = {
    "a_edit": {"sync_seconds": 1e-3, "min_total_steps": 2},
    "dilocox": _SOON | {"rank": 2},
    "streaming_diloco": _SOON | {"fragments": 2},
}


def _poisoned(comm: ThreadComm, name: str, kind: str, at: int) -> tuple[bool, bool, Tensors]:
    """One gradient of one replica is bad; the last step is not, as whoever is left out has to hear of it."""
    model, steps = _net(), 8
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheme = make_scheme({"name": name} | _KNOBS.get(name, _SOON))
    with scheme(model, optimizer, comm) as method:  # type: ignore[operator]
        for step in range(steps):
            generator = torch.Generator().manual_seed(100 * step + comm.rank)
            x = torch.randn(8, 5, generator=generator)

            def closure(x: Tensor = x, step: int = step) -> float:
                optimizer.zero_grad()
                loss = (model(x) - x[:, :3].sin()).square().mean()
                loss.backward()
                if (comm.rank, step) == (BAD_RANK, at):
                    weight = model[2].weight  # type: ignore[index]
                    if kind == "zero":
                        weight.grad.zero_()  # type: ignore[union-attr, operator]
                    else:
                        weight.grad[1, 1] = float(kind)  # type: ignore[index]
                return float(loss.detach())

            optimizer.step(closure)
    weights = {key: p.detach().clone() for key, p in model.named_parameters()}
    return _finite(weights), method.common_anchors, weights


@pytest.mark.parametrize("name", OUTER)
def test_one_bad_replica(name: str) -> None:
    for kind in ("nan", "inf", "zero"):
        for at in (0, 3, 7):
            first, other = run_threads(lambda c, k=kind, a=at: _poisoned(c, name, k, a), 2)
            assert first[0], (kind, at)
            assert other[0], (kind, at)
            if first[1]:
                assert _unchanged(first[2], other[2]), (kind, at)

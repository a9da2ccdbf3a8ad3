"""Sharpness-aware gradients: where they are taken, and that nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch

from commkit.outer.sam import sharpness_aware
from commkit.sim import ThreadComm, run_threads

CURVATURES = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)


def parts(x: torch.Tensor) -> list[torch.nn.Parameter]:
    """The vector in two parameters, and one without a gradient."""
    return [torch.nn.Parameter(t.clone()) for t in (x[:1], x[1:], torch.ones(2))]


def closure_of(params: list[torch.nn.Parameter], calls: list[int]):
    def closure() -> torch.Tensor:
        calls.append(1)
        for p in params:
            p.grad = None
        loss = (CURVATURES[:1] * params[0] ** 2).sum() / 2 + (
            CURVATURES[1:] * params[1] ** 2
        ).sum() / 2
        loss.backward()
        return loss.detach()

    return closure


def test_the_gradient_is_taken_rho_uphill() -> None:
    x, rho, calls = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), 0.05, []
    params = parts(x)
    loss, ok = sharpness_aware(params, closure_of(params, calls), rho)
    g = CURVATURES * x
    expected = CURVATURES * (x + rho * g / g.norm())
    torch.testing.assert_close(
        torch.cat([p.grad for p in params[:2]]), expected, rtol=0, atol=1e-14
    )
    assert torch.equal(torch.cat([p.detach() for p in params[:2]]), x)
    assert params[2].grad is None
    assert float(loss) == pytest.approx(float((CURVATURES * x**2).sum() / 2))
    assert ok
    assert len(calls) == 2


@pytest.mark.parametrize(("x", "rho"), [([0.5, -1.0, 2.0], 0.0), ([0.0, 0.0, 0.0], 0.05)])
def test_without_a_direction_or_a_distance_it_is_the_gradient(x: list[float], rho: float) -> None:
    start, calls = torch.tensor(x, dtype=torch.float64), []
    params = parts(start)
    _, ok = sharpness_aware(params, closure_of(params, calls), rho)
    assert torch.equal(torch.cat([p.grad for p in params[:2]]), CURVATURES * start)
    assert ok
    assert len(calls) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at_call", [1, 2])
def test_a_gradient_that_is_not_finite_is_reported(bad: float, at_call: int) -> None:
    x, calls = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), []
    params = parts(x)
    plain = closure_of(params, calls)

    def closure() -> torch.Tensor:
        loss = plain()
        if len(calls) == at_call:
            params[1].grad[0] = bad
        return loss

    _, ok = sharpness_aware(params, closure)
    assert not ok
    assert torch.equal(torch.cat([p.detach() for p in params[:2]]), x)


def test_parameters_are_put_back_when_the_second_pass_fails() -> None:
    x, calls = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), []
    params = parts(x)
    plain = closure_of(params, calls)

    def closure() -> torch.Tensor:
        if calls:
            raise RuntimeError("out of memory")
        return plain()

    with pytest.raises(RuntimeError, match="out of memory"):
        sharpness_aware(params, closure)
    assert torch.equal(torch.cat([p.detach() for p in params[:2]]), x)


def test_the_norm_is_of_all_shards() -> None:
    """Each rank has one of two parameters; together they take the step of the whole."""
    x, rho = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), 0.5
    whole = parts(x)
    sharpness_aware(whole, closure_of(whole, []), rho)

    def body(comm: ThreadComm) -> torch.Tensor:
        params = parts(x)
        sharpness_aware([params[comm.rank]], closure_of(params, []), rho, comm)
        return params[comm.rank].grad

    for ours, theirs in zip(run_threads(body, 2), whole[:2], strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("rho", [-0.1, math.nan, math.inf])
def test_rho_out_of_range(rho: float) -> None:
    with pytest.raises(ValueError, match=r"must be >= 0 and finite; use 0\.05"):
        sharpness_aware([], lambda: torch.zeros(()), rho)

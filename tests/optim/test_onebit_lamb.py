"""1-bit LAMB."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from commkit.optim import OneBitLamb
from tests.optim import driver
from tests.optim.driver import run, same_bits


def make(**fields: Any) -> driver.Make:
    settings: dict[str, Any] = {"lr": 1e-2, "freeze_step": 8, "min_numel": 0, "betas": (0.9, 0.99)}
    return lambda params: OneBitLamb(params, **(settings | fields))


def test_before_the_freeze_it_is_lamb() -> None:
    """Equation by equation in float64, on the mean gradient of one rank."""
    lr, decay, eps = 1e-2, 0.1, 1e-8
    ours = run(make(freeze_step=100, weight_decay=decay), 1, 15, dtype=torch.float64)[0]
    x = {name: p.detach().clone() for name, p in driver.parameters(dtype=torch.float64).items()}
    m = {name: torch.zeros_like(p) for name, p in x.items()}
    v = {name: torch.zeros_like(p) for name, p in x.items()}
    for step in range(15):
        for name in x:
            g = driver.noisy(0, step, name, x[name])
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.99 * v[name] + 0.01 * g * g
            u = m[name] / (v[name].sqrt() + eps) + decay * x[name]
            c = min(max(float(x[name].norm() / u.norm()), 0.01), 10.0)
            x[name] = x[name] - lr * c * u
    for name, value in x.items():
        torch.testing.assert_close(ours.parameters[name].detach(), value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_replicas_hold_the_same_bits_and_learn(world_size: int) -> None:
    ranks = run(make(weight_decay=0.01), world_size, 200)
    assert same_bits(ranks)
    start = torch.cat([p.reshape(-1) for p in driver.parameters().values()])
    assert float((ranks[0].flat() - 1).square().mean()) < 0.5 * float((start - 1).square().mean())


def test_a_tensor_without_momentum_stays_finite_and_still() -> None:
    """DeepSpeed divided by its RMS: 0 / 0."""

    def gradients(rank: int, step: int, name: str, x: Tensor) -> Tensor:
        return torch.zeros_like(x) if name == "conv" else driver.noisy(rank, step, name, x)

    ranks = run(make(), 2, 30, gradients)
    assert same_bits(ranks)
    assert bool(ranks[0].flat().isfinite().all())
    assert torch.equal(ranks[0].parameters["conv"], driver.parameters()["conv"])


def test_a_trust_ratio_of_one_throughout_the_warm_up_does_not_stop_the_tensor() -> None:
    """DeepSpeed averaged only ratios other than 1, and started from 0: such a tensor never moved again."""
    ranks = run(make(min_coeff=1.0, max_coeff=1.0), 2, 30)
    before = driver.parameters()
    for name, p in ranks[0].parameters.items():
        state = ranks[0].optimizer.state[p]
        assert state["coeff"] == 1.0
        assert not torch.equal(p, before[name])


def test_the_factor_moves_slowly_and_within_bounds() -> None:
    factors: list[float] = []

    def note(mine: driver.Replica, step: int) -> None:
        state = mine.optimizer.state[mine.parameters["matrix"]]
        if mine.comm.rank == 0 and "factor" in state:
            factors.append(state["factor"])

    def gradients(rank: int, step: int, name: str, x: Tensor) -> Tensor:
        # One magnitude for all elements: signs lose nothing, and the rebuilt gradients are exact.
        signs = torch.where(torch.arange(x.numel()).view(x.shape) % 3 == 0, -1.0, 1.0)
        return signs * (1.0 if step < 8 else 0.01)

    run(make(betas=(0.9, 0.9)), 2, 80, gradients, note)
    for last, factor in zip([1.0, *factors], factors, strict=False):
        assert 0.5 <= factor <= 4.0
        assert 0.9 * last - 1e-9 <= factor <= 1.1 * last + 1e-9
    assert max(factors) > 2  # v' has shrunk under the frozen v


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "coeff": ({"min_coeff": 2.0, "max_coeff": 1.0}, "min_coeff=2.0 must be in"),
    "factor": ({"factor_min": 2.0}, "factor_min=2.0"),
    "beta": ({"coeff_beta": 1.0}, "coeff_beta=1.0"),
    "threshold": ({"factor_threshold": 0.0}, "factor_threshold=0.0"),
    "freeze": ({"freeze_step": 3, "warmup_steps": 4}, "freeze_step=3 must not come before"),
}


@pytest.mark.parametrize(("fields", "message"), BAD.values(), ids=BAD)
def test_bad_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**fields)([nn.Parameter(torch.zeros(3))])

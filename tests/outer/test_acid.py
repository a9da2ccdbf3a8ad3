"""A2CiD2: what is conserved, what it is without momentum, and that momentum helps on a ring."""

from __future__ import annotations

import math

import pytest
import torch

from commkit.outer.acid import AD_PSGD, AcidCoefficients, AcidState
from commkit.outer.permutation import uniform
from commkit.outer.topologies import Ring, StaticExponential
from commkit.outer.topologies.rates import pair_rates

COEFFICIENTS = AcidCoefficients(eta=0.3, alpha=0.9)


def ranks(n: int, coefficients: AcidCoefficients = COEFFICIENTS) -> list[AcidState]:
    generator = torch.Generator().manual_seed(n)
    return [
        AcidState(
            [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 4), (5,), ())],
            coefficients,
        )
        for _ in range(n)
    ]


def flat(state: AcidState) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.cat([t.reshape(-1) for t in ts]) for ts in (state.params, state.copies))


def both(states: list[AcidState]) -> torch.Tensor:
    return sum(x + copy for x, copy in map(flat, states))


def meet(a: AcidState, b: AcidState) -> None:
    """Both sides at once: neither sees what the other has become."""
    before = [p.clone() for p in a.params]
    a.meet(b.params)
    b.meet(before)


@pytest.mark.parametrize(
    ("n", "eta", "alpha"),
    [(8, 0.289, 0.988), (16, 0.142, 1.87), (32, 0.070, 3.66), (64, 0.035, 7.26)],
)
def test_coefficients_of_rings_as_tabulated(n: int, eta: float, alpha: float) -> None:
    c = AcidCoefficients.of(pair_rates(Ring().mixing(n)))
    assert round(c.eta, 3) == eta
    assert float(f"{c.alpha:.3g}") == alpha


@pytest.mark.parametrize(
    ("n", "eta", "alpha"),
    [(8, 0.416, 0.624), (16, 0.352, 0.704), (32, 0.313, 0.782), (64, 0.285, 0.856)],
)
def test_coefficients_of_exponential_graphs_as_tabulated(n: int, eta: float, alpha: float) -> None:
    c = AcidCoefficients.of(pair_rates(StaticExponential().mixing(n)))
    assert (round(c.eta, 3), round(c.alpha, 3)) == (eta, alpha)


def test_the_copy_starts_as_the_parameters_and_is_no_view_of_them() -> None:
    (state,) = ranks(1)
    for p, copy in zip(state.params, state.copies, strict=True):
        assert torch.equal(p, copy)
        assert p.data_ptr() != copy.data_ptr()


def test_mixing_by_hand() -> None:
    state = AcidState([torch.tensor([3.0], dtype=torch.float64)], AcidCoefficients(0.25, 1.0))
    state.copies[0].fill_(1.0)
    state.mix(2 * math.log(2))  # e = 1/2
    assert float(state.params[0]) == pytest.approx(0.75 * 3 + 0.25 * 1)
    assert float(state.copies[0]) == pytest.approx(0.25 * 3 + 0.75 * 1)


def test_mixing_composes() -> None:
    once, twice = (ranks(1)[0] for _ in range(2))
    for state in (once, twice):
        for copy in state.copies:
            copy.mul_(-2)
    once.mix(1.7)
    twice.mix(0.4)
    twice.mix(0.0)
    twice.mix(1.3)
    for a, b in zip(flat(once), flat(twice), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_mixing_and_meetings_conserve_the_sum_whatever_the_clocks() -> None:
    states = ranks(5)
    before, apart = both(states), flat(states[0])[0].clone()
    for event in range(300):
        i, j = (int(5 * uniform(1, event, k)) for k in (0, 1))
        for k, state in enumerate((states[i], states[j])):
            state.mix(3 * uniform(2, event, k))
        if i != j:
            meet(states[i], states[j])
    torch.testing.assert_close(both(states), before, rtol=0, atol=1e-12)
    assert not torch.allclose(flat(states[0])[0], apart)


def test_a_gradient_moves_both_copies_alike() -> None:
    states = ranks(2)
    directions = [torch.ones_like(p) for p in states[0].params]
    before = both(states)
    states[0].mix(0.7)
    states[0].step(directions, lr=0.1)
    torch.testing.assert_close(both(states), before - 0.2, rtol=0, atol=1e-13)


def test_without_momentum_it_is_ad_psgd() -> None:
    states = ranks(4, AD_PSGD)
    model = [flat(state)[0].clone() for state in states]
    for event in range(50):
        i, j = event % 4, (event * 7 + 1 + event % 4) % 4
        if i == j:
            continue
        for state in (states[i], states[j]):
            state.mix(0.3 * event)
        meet(states[i], states[j])
        model[i] = model[j] = (model[i] + model[j]) / 2
    for state, x in zip(states, model, strict=True):
        params, copies = flat(state)
        torch.testing.assert_close(params, x, rtol=0, atol=1e-14)
        torch.testing.assert_close(copies, x, rtol=0, atol=1e-14)


def consensus(coefficients: AcidCoefficients, n: int, duration: float) -> float:
    """The variance left on a ring where every rank meets once per unit of time."""
    states = [
        AcidState(
            [torch.tensor([float(i % 2 == 0) + (i < n // 2)], dtype=torch.float64)], coefficients
        )
        for i in range(n)
    ]
    clocks, now, event = [0.0] * n, 0.0, 0
    while True:
        now -= math.log(1 - uniform(7, event, 0)) / (n / 2)
        if now > duration:
            break
        i = int(n * uniform(7, event, 1))
        for k in (i, (i + 1) % n):
            states[k].mix(now - clocks[k])
            clocks[k] = now
        meet(states[i], states[(i + 1) % n])
        event += 1
    return float(torch.stack([state.params[0] for state in states]).var())


def test_momentum_brings_a_ring_together_sooner() -> None:
    coefficients = AcidCoefficients.of(pair_rates(Ring().mixing(32)))
    plain, accelerated = (consensus(c, 32, 150.0) for c in (AD_PSGD, coefficients))
    assert accelerated < plain / 10


def test_a_bfloat16_model_has_float32_copies() -> None:
    a, b = (
        AcidState([torch.full((3,), v, dtype=torch.bfloat16)], COEFFICIENTS) for v in (1.0, 2.0)
    )
    assert a.copies[0].dtype == torch.float32
    a.mix(1.0)
    meet(a, b)
    assert torch.equal(a.params[0], b.params[0])
    assert a.params[0].dtype == torch.bfloat16
    assert float(a.copies[0][0]) == pytest.approx(1.9)


def test_the_copies_are_saved_and_loaded() -> None:
    a, b = ranks(2)
    a.mix(1.0)
    meet(a, b)
    again = AcidState([p.clone() for p in a.params], COEFFICIENTS)
    again.load_state_dict(a.state_dict())
    again.mix(0.5)
    a.mix(0.5)
    for x, y in zip(flat(a), flat(again), strict=True):
        assert torch.equal(x, y)
    with pytest.raises(ValueError, match="1 tensors that do not fit the model's 3"):
        a.load_state_dict({"0": torch.zeros(3, 4)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AcidCoefficients(-1.0, 0.5), "eta=-1.0 must be >= 0"),
        (lambda: AcidCoefficients(1.0, 0.0), "alpha=0.0 must be above 0"),
        (lambda: ranks(1)[0].mix(-0.1), "elapsed=-0.1 must be >= 0"),
    ],
)
def test_settings_out_of_range(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

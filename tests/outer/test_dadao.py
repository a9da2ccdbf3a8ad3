"""DADAO: it finds the optimum of the sum, at a linear rate, and conserves what it must."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from commkit.outer.dadao import X_, Y_, Z_, Dadao, DadaoConstants, X, Y, Z, sufficient_rate
from commkit.outer.topologies import Graph, Ring
from commkit.outer.topologies.rates import pair_rates

Vector = np.ndarray


class Problem(NamedTuple):
    gradients: list[Callable[[Vector], Vector]]
    optimum: Vector
    smoothness: float
    convexity: float


def quadratics(n: int, p: int = 4) -> Problem:
    """Half (x - c)' H (x - c), another H and c on each rank; the optimum solves sum H (x - c) = 0."""
    rng = np.random.default_rng(n)
    curvatures, centres = [], rng.standard_normal((n, p))
    for _ in range(n):
        basis = np.linalg.qr(rng.standard_normal((p, p)))[0]
        curvatures.append(basis @ np.diag(rng.uniform(0.1, 1, p)) @ basis.T)
    weighted = sum(h @ c for h, c in zip(curvatures, centres, strict=True))
    gradients = [lambda x, h=h, c=c: h @ (x - c) for h, c in zip(curvatures, centres, strict=True)]
    return Problem(gradients, np.linalg.solve(sum(curvatures), weighted), 1.0, 0.1)


def logistic(n: int, p: int = 3, samples: int = 20, penalty: float = 0.1) -> Problem:
    """Logistic regression, each rank with labels of its own kind; the optimum is Newton's."""
    rng = np.random.default_rng(100 + n)
    features = rng.standard_normal((n, samples, p))
    labels = np.where(features @ rng.standard_normal(p) + np.linspace(-1, 1, n)[:, None] > 0, 1, -1)
    signed = features * labels[..., None]

    def gradient(a: Vector, x: Vector) -> Vector:
        return -a.T @ (1 / (1 + np.exp(a @ x))) / samples + penalty * x

    x = np.zeros(p)
    for _ in range(50):
        slope = 1 / (2 + np.exp(signed @ x) + np.exp(-(signed @ x)))
        hessian = np.einsum(
            "nsp,ns,nsq->pq", signed, slope, signed
        ) / samples + n * penalty * np.eye(p)
        x = x - np.linalg.solve(hessian, sum(gradient(a, x) for a in signed))
    largest = max(np.linalg.norm(a, 2) ** 2 for a in signed)
    return Problem(
        [lambda x, a=a: gradient(a, x) for a in signed],
        x,
        largest / (4 * samples) + penalty,
        penalty,
    )


def solver(problem: Problem, rates: Vector, seed: int = 0) -> Dadao:
    enough = rates * sufficient_rate(rates)
    p = len(problem.optimum)
    return Dadao(
        problem.gradients, np.zeros(p), problem.smoothness, problem.convexity, enough, seed
    )


def test_the_constants_by_hand() -> None:
    """L = 8, mu = 1: nu = 1/2, sqrt(nu / L) = 1/4; so a = delta = 1/16, a~ = eta = 1/32, theta = 2,
    gamma = 1/32, gamma~ = 1/8, beta = 1/2, beta~ = 8 chi1."""
    constants = DadaoConstants(8.0, 1.0, chi1=3.0)
    assert constants.nu == 0.5
    np.testing.assert_allclose(
        constants.drift() * 32,
        [
            [-1, 1, 0, 0, 0, 0],
            [1, -1, 0, 0, 0, 0],
            [0, 0, -2, 2, 0, 0],
            [0, -32, -64, 0, -64, 0],
            [0, 0, 0, 0, -2, 2],
            [0, 0, 0, 0, 1, -1],
        ],
        rtol=0,
        atol=1e-13,
    )
    np.testing.assert_allclose(constants.gradient_steps(), [-1 / 32, -1 / 8, 0, 17 / 16, 0, 0])
    np.testing.assert_allclose(constants.meeting_steps(), [0, 0, 0, 0, 1 / 2, 24])


def test_the_optima_are_optima() -> None:
    for problem in (quadratics(6), logistic(5)):
        total = sum(gradient(problem.optimum) for gradient in problem.gradients)
        np.testing.assert_allclose(total, 0, rtol=0, atol=1e-12)
        alone = [np.linalg.norm(gradient(problem.optimum)) for gradient in problem.gradients]
        assert min(alone) > 1e-2  # no rank would find it by itself


@pytest.mark.parametrize(
    ("problem", "rates"),
    [
        (quadratics(6), pair_rates(Ring().mixing(6))),
        (logistic(5), pair_rates(Ring().mixing(5))),
        (quadratics(4), pair_rates(Graph([[0, 1], [1, 2], [1, 3]]).mixing(4))),
    ],
    ids=["quadratics-ring", "logistic-ring", "quadratics-star"],
)
def test_it_finds_the_optimum_at_a_linear_rate(problem: Problem, rates: Vector) -> None:
    """After the first, every 150 gradients per rank divide the error by at least ten, down to 1e-6 of the
    start's."""
    run = solver(problem, rates)
    errors = [float(np.abs(problem.optimum).max())]
    for _ in range(6):
        x = run.run(150.0)
        errors.append(float(np.abs(x - problem.optimum).max()))
    assert all(after < before / 10 for before, after in itertools.pairwise(errors[1:]))
    assert errors[-1] < 1e-6 * errors[0]


def test_the_means_of_z_stay_where_they_started() -> None:
    run = solver(quadratics(6), pair_rates(Ring().mixing(6)))
    for _ in range(5):
        run.run(20.0)
        for kind in (Z, Z_):
            size = np.abs(run.state[:, kind]).max()
            assert size > 1e-3
            np.testing.assert_allclose(run.state[:, kind].mean(0), 0, rtol=0, atol=1e-12 * size)


def test_events_have_their_rates() -> None:
    """Poisson counts, within five standard deviations; and another seed is another run."""
    rates = pair_rates(Ring().mixing(6))
    run, other = solver(quadratics(6), rates), solver(quadratics(6), rates, seed=1)
    x, y = run.run(100.0), other.run(100.0)
    expected = 100 * 6 * sufficient_rate(rates) / 2
    assert abs(run.gradients_taken - 600) < 5 * 600**0.5
    assert abs(run.meetings - expected) < 5 * expected**0.5
    assert not np.array_equal(x, y)
    np.testing.assert_array_equal(x, solver(quadratics(6), rates).run(100.0))


def test_the_optimum_is_a_fixed_point() -> None:
    """At x = x~ = x*, y = y~ = grad - nu x*, z = z~ = -(y + nu x*) nothing moves any more."""
    problem = quadratics(5)
    run = solver(problem, pair_rates(Ring().mixing(5)))
    nu = run.constants.nu
    for i, gradient in enumerate(problem.gradients):
        own = run.state[i]
        own[X] = own[X_] = problem.optimum
        own[Y] = own[Y_] = gradient(problem.optimum) - nu * problem.optimum
        own[Z] = own[Z_] = -(own[Y] + nu * problem.optimum)
    np.testing.assert_allclose(run.state[:, Z].mean(0), 0, rtol=0, atol=1e-12)
    x = run.run(50.0)
    assert run.meetings > 100
    np.testing.assert_allclose(x, np.tile(problem.optimum, (5, 1)), rtol=0, atol=1e-11)


def test_too_few_meetings_are_refused_and_would_diverge() -> None:
    rates = pair_rates(Ring().mixing(6))
    factor = sufficient_rate(rates)
    problem = quadratics(6)
    with pytest.raises(ValueError, match=r"pairs meet too rarely.*use rates 2 times as high"):
        Dadao(problem.gradients, np.zeros(4), 1.0, 0.1, rates * factor / 2)
    run = solver(problem, rates)
    run._cumulated[6:] = (
        6 + (run._cumulated[6:] - 6) / 4
    )  # the constants of frequent meetings, but few
    assert np.abs(run.run(200.0)).max() > 1e3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DadaoConstants(1.0, 0.0, 1.0), "convexity=0.0 must be above 0 and at most"),
        (
            lambda: DadaoConstants(1.0, 2.0, 1.0),
            "convexity=2.0 must be above 0 and at most smoothness=1",
        ),
        (
            lambda: Dadao([], np.zeros(1), 1.0, 1.0, np.zeros((2, 2))),
            r"rates are \(2, 2\) but there are 0 functions",
        ),
    ],
)
def test_what_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

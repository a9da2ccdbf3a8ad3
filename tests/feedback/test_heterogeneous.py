"""Ranks whose data differ: no rank's gradient is zero where their mean is."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from commkit.schemes import make_reducer
from commkit.sim import ThreadComm, run_threads

RANKS, SIZE, STEPS, LR = 3, 32, 400, 0.3


@functools.cache
def problem() -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Quadratics (x - b)' A (x - b) / 2 with eigenvalues from 0.1 to 1 and minima far from each other."""
    generator = torch.Generator().manual_seed(0)
    curvatures, minima = [], []
    for _ in range(RANKS):
        square = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
        basis, _ = torch.linalg.qr(square)
        values = torch.logspace(-1, 0, SIZE, dtype=torch.float64)
        curvatures.append(basis @ values.diag() @ basis.T)
        minima.append(10 * torch.randn(SIZE, generator=generator, dtype=torch.float64))
    pulls = [a @ b for a, b in zip(curvatures, minima, strict=True)]
    return curvatures, minima, torch.linalg.solve(sum(curvatures), sum(pulls))


@functools.cache
def distances(scheme: str) -> list[float]:
    """To the common optimum, relative to the start's, after each step of descent."""
    curvatures, minima, optimum = problem()

    def body(comm: ThreadComm) -> list[float]:
        x = torch.zeros(SIZE, dtype=torch.float64)
        reducer, seen = make_reducer({"name": scheme, "density": 0.1, "min_numel": 0}), []
        for _ in range(STEPS):
            gradient = curvatures[comm.rank] @ (x - minima[comm.rank])
            x = x - LR * reducer.reduce({"x": gradient}, comm)["x"]
            reducer.end_step()
            seen.append(float((x - optimum).norm() / optimum.norm()))
        return seen

    return run_threads(body, RANKS)[0]


def test_plain_error_feedback_stalls() -> None:
    """Residuals cannot empty: each rank's gradient goes on filling them, and x follows their mean."""
    curve = distances("topk")
    first, second = min(curve[STEPS // 2 : 3 * STEPS // 4]), min(curve[3 * STEPS // 4 :])
    assert second > 0.5 * first, "still on its way"
    assert second > 0.01


@pytest.mark.parametrize("scheme", ["ef21", "econtrol"])
def test_estimates_converge_linearly(scheme: str) -> None:
    curve = distances(scheme)
    quarters = [max(curve[i : i + 50]) for i in range(0, STEPS, STEPS // 4)]
    for before, after in itertools.pairwise(quarters):
        assert after < 0.5 * before, quarters
    assert curve[-1] < 0.001 * min(distances("topk")[STEPS // 2 :])

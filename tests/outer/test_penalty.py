"""Laws of the pseudo-gradient penalty."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from commkit.outer.penalty import Detectors, Penalty, shares

INF, NAN = math.inf, math.nan


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one(detectors: Detectors, norm: float) -> bool:
    """Judge and, if accepted, feed a single value."""
    accepted = bool(detectors.accepts(0, f64(norm)))
    detectors.feed(f64(norm if accepted else INF)[None])
    return accepted


def noisy(count: int, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (1 + 0.1 * torch.randn(count, generator=generator, dtype=torch.float64)).tolist()


def test_the_first_norm_starts_the_mean() -> None:
    detectors = Detectors(1, 1, Penalty())
    assert one(detectors, 5.0)
    state = detectors.state_dict()
    assert state["mean"].item() == 5.0
    assert state["variance"].item() == 0.0


def test_the_recursion_of_equation_3_4() -> None:
    detectors = Detectors(1, 1, Penalty(ewma=0.1, warm_rounds=3))
    mean, m2, recent = 2.0, 0.0, [0.0]
    one(detectors, 2.0)
    for norm in (2.5, 1.5, 2.25, 2.125):
        assert one(detectors, norm)
        d = norm - mean
        mean += 0.1 * d
        m2 = 0.9 * (m2 + 0.1 * d * (norm - mean))
        recent = [*recent, (norm - mean) / math.sqrt(m2)][-3:]
    state = detectors.state_dict()
    assert state["mean"].item() == pytest.approx(mean, rel=1e-12)
    assert state["variance"].item() == pytest.approx(m2, rel=1e-12)
    assert sorted(state["recent"].flatten().tolist()) == pytest.approx(sorted(recent), rel=1e-12)
    assert state["count"].item() == 5


def test_nothing_is_anomalous_while_warming_up() -> None:
    detectors = Detectors(1, 1, Penalty(warm_rounds=10))
    assert all(one(detectors, norm) for norm in [*noisy(9), 100.0])


def test_a_second_spike_is_found_after_the_first_and_a_long_row_of_them() -> None:
    detectors = Detectors(1, 1, Penalty(warm_rounds=20))
    for norm in noisy(40):
        assert one(detectors, norm)
    before = detectors.state_dict()
    for _ in range(50):
        assert not one(detectors, 3.0)
    for name, value in detectors.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert one(detectors, 1.0)
    assert not one(detectors, 3.0)


def test_small_norms_are_never_anomalous() -> None:
    detectors = Detectors(1, 1, Penalty(warm_rounds=10))
    for norm in noisy(30):
        one(detectors, norm)
    assert one(detectors, 0.0)


@pytest.mark.parametrize("norm", [INF, NAN])
@pytest.mark.parametrize("seen", [0, 5, 40])
def test_what_is_not_finite_is_rejected_and_leaves_no_trace(norm: float, seen: int) -> None:
    detectors = Detectors(1, 1, Penalty(warm_rounds=10))
    for good in noisy(seen):
        one(detectors, good)
    before = detectors.state_dict()
    assert not one(detectors, norm)
    for name, value in detectors.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_layers_and_replicas_are_apart() -> None:
    detectors = Detectors(2, 3, Penalty(warm_rounds=5))
    generator = torch.Generator().manual_seed(1)
    scale = torch.tensor([[1.0, 10.0, 100.0], [5.0, 50.0, 500.0]], dtype=torch.float64)
    for _ in range(30):
        noise = 1 + 0.05 * torch.randn(2, 3, generator=generator, dtype=torch.float64)
        detectors.feed(scale * noise)
    assert detectors.accepts(0, f64(1, 10, 1000)).tolist() == [True, True, False]
    assert detectors.accepts(1, f64(5, 500, 500)).tolist() == [True, False, True]
    assert detectors.accepts(0, f64(5, 50, 500)).tolist() == [False, False, False]


def test_state_round_trip_and_choice_of_replicas() -> None:
    penalty = Penalty(warm_rounds=5)
    detectors = Detectors(3, 1, penalty)
    for index, norm in enumerate(noisy(12)):
        detectors.feed(f64(norm, 2 * norm, INF if index % 2 else norm)[:, None])
    loaded = Detectors.of_state(detectors.state_dict(), penalty)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value.nan_to_num(9.0), detectors.state_dict()[name].nan_to_num(9.0))
    chosen = detectors.of([2, 0, 7]).state_dict()
    old = detectors.state_dict()
    assert chosen["mean"][0] == old["mean"][2]
    assert chosen["mean"][1] == old["mean"][0]
    assert chosen["count"][:, 0].tolist() == [6, 12, 0]
    with pytest.raises(ValueError, match="warm_rounds=6 does not fit saved detectors"):
        Detectors.of_state(detectors.state_dict(), Penalty(warm_rounds=6))


ONES = f64(1, 1, 1)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (1.0, [0.665, 0.245, 0.090]),
        (0.01, [0.337, 0.333, 0.330]),
        (100.0, [1.0, 0.0, 0.0]),
    ],
)
def test_absolute_weights_depend_on_scale(scale: float, expected: list[float]) -> None:
    weights = Penalty().weights(scale * f64(1, 2, 3)[:, None], ONES)
    assert weights[:, 0].tolist() == pytest.approx(expected, abs=5e-4)


def test_relative_weights_do_not() -> None:
    penalty = Penalty(weighting="relative")
    results = [
        penalty.weights(scale * f64(1, 2, 3)[:, None], ONES) for scale in (1e-6, 1.0, 2.0**60)
    ]
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[1], results[2])
    torch.testing.assert_close(results[1], torch.softmax(-f64(0.5, 1, 1.5)[:, None], 0))


@pytest.mark.parametrize("weighting", ["absolute", "relative", "none"])
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e9])
def test_weights_sum_to_1_and_what_is_rejected_has_exactly_0(
    weighting: Any, temperature: float
) -> None:
    norms = torch.stack([f64(1, INF, 2, 3), f64(0, 0, INF, 0), f64(INF, INF, INF, 5)], dim=1)
    weights = Penalty(weighting=weighting, temperature=temperature).weights(norms, f64(1, 1, 1, 2))
    torch.testing.assert_close(weights.sum(0), f64(1, 1, 1))
    assert (weights[~norms.isfinite()] == 0).all()
    assert weights[3, 2] == 1.0
    if weighting == "none":
        torch.testing.assert_close(weights[:, 0], f64(0.25, 0, 0.25, 0.5))


def test_nobody_counts() -> None:
    norms = torch.full((3, 1), INF, dtype=torch.float64)
    assert Penalty().weights(norms, ONES).tolist() == [[0.0]] * 3
    assert Penalty(weighting="relative").weights(f64(1, 2, 3)[:, None], 0 * ONES).sum() == 0


def test_all_norms_zero_weigh_equally() -> None:
    for weighting in ("absolute", "relative"):
        weights = Penalty(weighting=weighting).weights(0 * ONES[:, None], ONES)
        torch.testing.assert_close(weights[:, 0], ONES / 3)


def test_shares_are_renormalised() -> None:
    counts = torch.tensor([[True], [False], [True]])
    assert shares(f64(0.2, 0.5, 0.3)[:, None], counts)[:, 0].tolist() == pytest.approx(
        [0.4, 0, 0.6]
    )


def test_clip() -> None:
    penalty = Penalty(clip=2.0)
    for norm in (0.0, 1.0, 2.0, 8.0, 1e12):
        factor = penalty.shrink(f64(norm)[0]).item()
        assert factor * norm <= 2.0 * (1 + 1e-12)
        assert factor == 1.0 or norm > 2.0
    assert Penalty(clip=None).shrink(f64(1e12)[0]) == 1.0


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"warm_rounds": 0}, "warm_rounds=0 must be >= 1"),
        ({"ewma": 0.0}, r"ewma=0.0 must be in \(0, 1\]"),
        ({"threshold": NAN}, "threshold=nan must be > 0"),
        ({"weighting": "mean"}, "weighting='mean' must be"),
        ({"temperature": 0.0}, "temperature=0.0 must be > 0"),
        ({"clip": 0.0}, "clip=0.0 must be > 0"),
    ],
)
def test_bad_knobs(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Penalty(**knobs)

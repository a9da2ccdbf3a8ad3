"""Averages of weights over time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from commkit.outer import LatestWeightAverage, OuterEMA
from tests.outer.problem import Net, assert_same, weights


def _set(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.fill_(value)


@pytest.mark.parametrize("updates", [1, 3, 7, 130])
def test_lawa_is_the_mean_of_the_last_k(updates: int) -> None:
    model = Net(0)
    average = LatestWeightAverage(model, k=3)
    values = torch.rand(updates, generator=torch.Generator().manual_seed(1)).tolist()
    for value in values:
        _set(model, value)
        assert average.update()
    expected = sum(values[-3:]) / len(values[-3:])
    for x in average.average().values():
        torch.testing.assert_close(x, torch.full_like(x, expected))


def test_ema_follows_its_recurrence_with_and_without_warm_up() -> None:
    for warm_up in (True, False):
        model = Net(0)
        average, expected = OuterEMA(model, decay=0.8, warm_up=warm_up), 0.0
        for r in range(40):
            value = float(r % 7)
            _set(model, value)
            average.update()
            d = min(0.8, (1 + r) / (10 + r)) if warm_up else 0.8
            expected = value if r == 0 else d * expected + (1 - d) * value
        for x in average.average().values():
            torch.testing.assert_close(x, torch.full_like(x, expected))


def test_no_decay_is_the_last_and_constant_weights_stay() -> None:
    model = Net(0)
    last, constant = OuterEMA(model, decay=0.0, warm_up=False), OuterEMA(model, decay=0.9)
    for _ in range(3):
        constant.update()
    for value in (1.0, 2.0):
        _set(model, value)
        last.update()
    for x in last.average().values():
        assert torch.equal(x, torch.full_like(x, 2.0))
    fresh = weights(Net(0))
    assert all(torch.allclose(x, fresh[name]) for name, x in constant.average().items())


@pytest.mark.parametrize("make", [lambda m: LatestWeightAverage(m, 2), OuterEMA])
def test_what_they_share(make: Any) -> None:
    model = Net(0)
    average = make(model)
    with pytest.raises(RuntimeError, match="call update"):
        average.average()
    average.update()
    _set(model, 2.0)
    average.update()
    kept = average.average()
    _set(model, float("nan"))
    assert not average.update()
    assert_same(average.average(), kept)
    _set(model, 5.0)
    model.norm.running_mean.fill_(3.0)
    before = {n: x.clone() for n, x in model.state_dict().items()}
    with average.applied():
        live = weights(model)
        for name, x in kept.items():
            assert torch.equal(live[name], x)
        model.norm.running_mean.fill_(7.0)
    assert_same(before, dict(model.state_dict()))
    again = make(model)
    again.load_state_dict(average.state_dict())
    for one in (average, again):
        one.update()
    assert_same(average.average(), again.average())
    assert average.updates == again.updates == 3


def test_bad_knobs() -> None:
    with pytest.raises(ValueError, match="k=0"):
        LatestWeightAverage(Net(0), 0)
    with pytest.raises(ValueError, match=r"decay=1\.0"):
        OuterEMA(Net(0), 1.0)
    full = LatestWeightAverage(Net(0), 3)
    for _ in range(3):
        full.update()
    with pytest.raises(ValueError, match="k=2"):
        LatestWeightAverage(Net(0), 2).load_state_dict(full.state_dict())

"""Top-k: exactly k of largest magnitude, however they are found."""

from __future__ import annotations

import math

import pytest
import torch

from commkit.compressors import TopK

from .inputs import ctx_of, sample, transmit


@pytest.mark.parametrize(
    ("n", "density", "k"),
    [(0, 0.1, 0), (1, 0.001, 1), (7, 0.5, 4), (1000, 0.001, 1), (1001, 0.001, 2), (9, 1.0, 9)],
)
def test_number_of_elements(n: int, density: float, k: int) -> None:
    assert TopK(density).k(n) == k


def pairs(x: torch.Tensor, compressor: TopK) -> tuple[torch.Tensor, torch.Tensor]:
    indices, values = compressor.compress(x, ctx_of(x))
    assert indices.dtype == torch.int32
    assert indices.unique().numel() == indices.numel()
    return indices.long(), values


@pytest.mark.parametrize("threshold", ["exact", "sampled", "auto"])
@pytest.mark.parametrize("density", [0.0005, 0.01, 0.3])
@pytest.mark.parametrize("power", [1, 3])
def test_the_largest_are_sent(threshold, density: float, power: int) -> None:
    x = sample(50_000) ** power
    indices, values = pairs(x, TopK(density, threshold))
    k = math.ceil(density * x.numel())
    assert indices.numel() == k
    assert torch.equal(values, x[indices])
    largest = x.abs().sort(descending=True).values[:k]
    assert torch.equal(values.abs().sort(descending=True).values, largest)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_sampled_selection_of_other_dtypes(dtype: torch.dtype) -> None:
    x = sample(20_000, dtype=dtype)
    _, values = pairs(x, TopK(0.01, "sampled"))
    largest = x.abs().float().sort(descending=True).values[:200]
    assert torch.equal(values.abs().sort(descending=True).values, largest)


@pytest.mark.parametrize("threshold", ["exact", "sampled"])
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_equal_magnitudes_still_give_k(threshold, value: float) -> None:
    indices, _ = pairs(torch.full((10_000,), value), TopK(0.01, threshold))
    assert indices.numel() == 100


def test_combine_adds_up_what_meets_in_one_place() -> None:
    compressor, ctx = TopK(0.5), ctx_of(torch.empty(4))
    payloads = [
        (torch.tensor([0, 2], dtype=torch.int32), torch.tensor([1.0, 2.0])),
        (torch.tensor([2, 3], dtype=torch.int32), torch.tensor([4.0, -8.0])),
    ]
    assert compressor.combine(payloads, ctx).tolist() == [0.5, 0.0, 3.0, -4.0]


@pytest.mark.parametrize(("values", "eps"), [("bf16", 2**-9), ("fp16", 2**-12)])
def test_short_values_are_rounded_to_nearest(values, eps: float) -> None:
    x = sample(1000)
    sent = transmit(TopK(1.0, values=values), x)
    assert bool(((sent - x).abs() <= 1.01 * eps * 2 * x.abs() + 1e-7).all())


@pytest.mark.parametrize(
    ("density", "shares"),
    [
        (0.001, [0.25, 0.0625, 0.015625, 0.00390625, 0.001]),
        (0.05, [0.25, 0.0625, 0.05, 0.05, 0.05]),
        (0.5, [0.5] * 5),
    ],
)
@pytest.mark.parametrize("warmup_steps", [4, 8, 1000])
def test_warm_up_comes_down_in_four_equal_stages(density, shares, warmup_steps: int) -> None:
    compressor = TopK(density, warmup_steps=warmup_steps)
    length = warmup_steps // 4
    for stage, share in enumerate(shares):
        for step in (stage * length, (stage + 1) * length - 1):
            assert compressor.density_at(step) == share
    assert compressor.density_at(10**9) == density


def test_a_warm_up_shorter_than_its_stages_skips_some() -> None:
    compressor = TopK(0.001, warmup_steps=2)
    assert [compressor.density_at(step) for step in range(3)] == [0.25, 0.015625, 0.001]


@pytest.mark.parametrize("threshold", ["exact", "sampled"])
def test_payload_follows_the_warm_up(threshold) -> None:
    x = sample(10_000)
    compressor = TopK(0.001, threshold, warmup_steps=8)
    for step, k in ((0, 2500), (2, 625), (4, 157), (6, 40), (8, 10)):
        ctx = ctx_of(x, step=step)
        indices, values = compressor.compress(x, ctx)
        assert indices.numel() == values.numel() == k
        assert compressor.payload_bytes(ctx) == 8 * k
        largest = x.abs().sort(descending=True).values[:k]
        assert torch.equal(values.abs().sort(descending=True).values, largest)

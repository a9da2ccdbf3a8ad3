"""The dynamic code: its levels, rounding between them, and scales down to the smallest float."""

from __future__ import annotations

import pytest
import torch

from commkit.compressors import BlockQuantize, DynamicTree
from commkit.compressors.dynamic_tree import dynamic_levels

from .inputs import ctx_of, sample, transmit

LEVELS = dynamic_levels(torch.device("cpu"))


def test_levels() -> None:
    assert LEVELS.numel() == 256
    assert bool((LEVELS.diff() > 0).all())
    positive, negative = LEVELS[LEVELS > 0], LEVELS[LEVELS < 0]
    assert positive.numel() == 128
    assert torch.equal(positive[:-1], -negative.flip(0))
    assert positive[0].item() == pytest.approx(5.5e-7)
    assert positive[-2:].tolist() == pytest.approx([0.99296875, 1.0])
    assert negative[0].item() == pytest.approx(-0.99296875)
    for i in range(7):
        decade = positive[(positive > 10.0 ** (i - 7)) & (positive < 10.0 ** (i - 6))]
        assert decade.numel() == 2**i


def test_golden_payload() -> None:
    x = torch.tensor([2.0, 0.0, -2 * 0.99296875, 1.1e-6])
    codes, scales = DynamicTree(rounding="nearest").compress(x, ctx_of(x))
    assert codes.tolist() == [255, 127, 0, 128]
    assert scales.tolist() == [2.0]


@pytest.mark.parametrize("block_size", [1, 7, 64, 256])
def test_nearest_is_the_nearest_level(block_size: int) -> None:
    x = sample(1000) ** 3
    compressor = DynamicTree(block_size, "nearest")
    _, scales = compressor.compress(x, ctx_of(x))
    scale = scales.repeat_interleave(block_size)[:1000].double().unsqueeze(1)
    best = (LEVELS.double() * scale - x.double().unsqueeze(1)).abs().amin(1)
    error = (transmit(compressor, x).double() - x.double()).abs()
    # one division and one product in float32
    assert bool((error <= best + 2.0**-22 * x.double().abs()).all())


def test_nearest_is_idempotent() -> None:
    once = transmit(DynamicTree(rounding="nearest"), sample(1000))
    torch.testing.assert_close(
        transmit(DynamicTree(rounding="nearest"), once), once, rtol=2**-22, atol=0
    )


def test_stochastic_takes_one_of_the_two_neighbours() -> None:
    x, draws = sample(64), 400
    x[0] = 4.0  # the scale
    sent = torch.stack([transmit(DynamicTree(), x, salt=i) for i in range(draws)]) / 4
    above = torch.bucketize(x / 4, LEVELS)
    high, low = LEVELS[above], LEVELS[above - 1]
    assert bool(((sent == high) | (sent == low)).all())
    share = (x / 4 - low) / (high - low)
    deviation = (share * (1 - share) / draws).sqrt()
    assert bool((((sent == high).float().mean(0) - share).abs() <= 5 * deviation).all())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_extreme_of_a_block_is_exact_whatever_its_sign(sign: int, rounding) -> None:
    """The most negative level is not -1: with max|x| as the scale -max would come out 0.7 % too small, and
    no rounding between levels could be unbiased."""
    x = sample(4096)
    x[::256] = sign * 10 * torch.arange(1.0, 17.0)
    sent = transmit(DynamicTree(256, rounding), x)
    torch.testing.assert_close(sent[::256], x[::256], rtol=2**-22, atol=0)


@pytest.mark.parametrize("i", range(1, 7))
def test_small_elements_beside_large_ones_survive(i: int) -> None:
    """The decade that ends at 10^(i-6) has 2^i cells; a linear code has none below 1/254."""
    end = 10.0 ** (i - 6)
    x = torch.linspace(0.15 * end, 0.95 * end, 256)
    x[0] = 1.0
    error = (transmit(DynamicTree(rounding="nearest"), x) - x).abs()
    assert float(error.max()) <= 0.4501 * end / 2**i
    if end < 1 / 254:
        assert not transmit(BlockQuantize(rounding="nearest"), x)[1:].any()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("largest", [2.0**-149, 2.0**-140, 2.0**-130, 2.0**-126])
def test_denormal_blocks_keep_their_relative_error(largest: float, rounding) -> None:
    """Within a cell of the scale, and the grid of denormals on which scale and result lie."""
    grid = 2.0**-149
    x = (sample(256, dtype=torch.float64).clamp(-3, 3) / 3 * largest).float()
    error = (transmit(DynamicTree(256, rounding), x).double() - x.double()).abs()
    assert float(error.max()) <= 1.008 * 0.9 / 64 * largest + 2 * grid


def test_a_zero_block_is_zeros_and_spoils_no_other() -> None:
    x = torch.cat([torch.zeros(256), sample(256)])
    codes, scales = DynamicTree().compress(x, ctx_of(x))
    assert scales[0] == 0
    assert bool((codes[:256] == 127).all())
    assert not transmit(DynamicTree(), x)[:256].any()


@pytest.mark.parametrize("size", [1e-30, 1e30, 3e38])
def test_huge_and_tiny(size: float) -> None:
    x = torch.tensor([1.0, -1.0, 0.5, 0.0]) * size
    error = (transmit(DynamicTree(), x).double() - x.double()).abs() / size
    assert float(error.max()) <= 1.008 * 0.9 / 64

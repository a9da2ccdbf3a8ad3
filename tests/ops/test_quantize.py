"""Block quantisation: error bounds, exact points, blocks that end early, and what is not a number."""

from __future__ import annotations

import pytest
import torch

from commkit import ops

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BLOCK = 64
# y = x / scale is rounded twice in float32 (reciprocal and product), at |y| <= 127.
ROUNDING = 127 * 2**-22


def round_trip(
    x: torch.Tensor, bits: int = 8, stochastic: bool = False, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is decoded, and the scale of each element."""
    codes, scales = ops.quantize_blocks(x, bits, BLOCK, stochastic, seed)
    decoded = ops.dequantize_blocks(codes, scales, x.numel(), bits, BLOCK)
    return decoded, scales.repeat_interleave(BLOCK)[: x.numel()]


def values(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)) ** 3
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n", [0, 1, 7, 63, 64, 65, 4097])
def test_error_is_bounded_by_the_scale(n: int, bits: int, dtype: torch.dtype) -> None:
    x = values(n, dtype)
    for stochastic, steps in ((False, 0.5), (True, 1.0)):
        decoded, scale = round_trip(x, bits, stochastic)
        assert decoded.dtype == torch.float32
        error = (x.double() - decoded.double()).abs()
        assert bool((error <= scale.double() * (steps + ROUNDING)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("stochastic", [False, True])
def test_zero_and_the_largest_are_exact(bits: int, stochastic: bool, dtype: torch.dtype) -> None:
    x = values(4097, dtype)
    x[::3] = 0
    decoded, _ = round_trip(x, bits, stochastic, seed=3)
    assert not decoded[::3].any()
    for block, sent in zip(x.split(BLOCK), decoded.split(BLOCK), strict=True):
        at = block.abs().argmax()
        # max -> scale -> max: one division and one product in float32
        assert abs(sent[at] - block[at]) <= abs(block[at].float()) * 2**-23


@pytest.mark.parametrize("bits", [4, 8])
def test_nearest_rounding_is_idempotent(bits: int) -> None:
    once, scale = round_trip(values(1000), bits)
    twice, _ = round_trip(once, bits)
    assert bool(((once - twice).abs() <= scale * ROUNDING).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_scale_belongs_to_its_block_alone(bits: int) -> None:
    """The last block is short: only its own elements count, and padding weighs nothing."""
    x = torch.cat([torch.full((BLOCK,), 100.0), torch.tensor([1e-3, -2e-3])])
    _, scales = ops.quantize_blocks(x, bits, BLOCK, False, 0)
    top = 2 ** (bits - 1) - 1
    assert scales.tolist() == pytest.approx([100 / top, 2e-3 / top], rel=2**-22)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1e-30, 1e30, 3e38])
def test_bounds_are_relative(bits: int, size: float) -> None:
    x = values(200).clamp(-1, 1) * size
    decoded, scale = round_trip(x, bits)
    assert decoded.any()
    assert bool(((x - decoded).abs() <= scale * (0.5 + ROUNDING)).all())


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_denormal_block_is_sent_as_zeros(stochastic: bool) -> None:
    x = torch.cat([torch.full((BLOCK,), 1e-40), torch.ones(BLOCK)])
    decoded, scale = round_trip(x, 8, stochastic)
    assert not decoded[:BLOCK].any()
    assert not scale[:BLOCK].any()
    assert decoded[BLOCK:].tolist() == pytest.approx([1.0] * BLOCK, rel=2**-22)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_bad_block_does_not_look_finite(bits: int, stochastic: bool, bad: float) -> None:
    x = values(3 * BLOCK)
    x[BLOCK + 5] = bad
    decoded, scale = round_trip(x, bits, stochastic)
    assert not scale[BLOCK : 2 * BLOCK].isfinite().any()
    assert not decoded[BLOCK + 5].isfinite()
    assert decoded[:BLOCK].isfinite().all()
    assert decoded[2 * BLOCK :].isfinite().all()


def test_codes_of_8_bits_are_int8() -> None:
    x = torch.tensor([127.0, -127.0, 3.0, -1.0, 0.0])
    codes, _ = ops.quantize_blocks(x, 8, BLOCK, False, 0)
    assert codes.view(torch.int8).tolist() == [127, -127, 3, -1, 0]


def test_codes_of_4_bits_are_nibbles_low_first() -> None:
    x = torch.tensor([7.0, -7.0, 1.0, 0.0, -3.0])
    codes, scales = ops.quantize_blocks(x, 4, BLOCK, False, 0)
    assert scales.tolist() == [1.0]
    low_high = [(int(c) & 15, int(c) >> 4) for c in codes]
    assert low_high[:2] == [(15, 1), (9, 8)]
    assert low_high[2][0] == 5


@pytest.mark.parametrize("bits", [4, 8])
def test_stochastic_rounding_depends_on_its_seed_alone(bits: int) -> None:
    x = values(500)
    first, again, other = (round_trip(x, bits, True, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_nearest_rounding_ignores_the_seed() -> None:
    x = values(500)
    assert torch.equal(round_trip(x, 8, False, 1)[0], round_trip(x, 8, False, 2)[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_the_input_is_left_alone(bits: int) -> None:
    x = values(2 * BLOCK)
    before = x.clone()
    round_trip(x, bits, True)
    assert torch.equal(x, before)

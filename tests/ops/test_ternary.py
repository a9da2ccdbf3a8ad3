"""Two bits per element: code + 1, the first element in the lowest bits."""

from __future__ import annotations

import pytest
import torch

from commkit import ops

SIZES = (0, 1, 3, 4, 5, 63, 64, 65, 4097)


def codes(n: int) -> torch.Tensor:
    return torch.randint(-1, 2, (n,), generator=torch.Generator().manual_seed(n)).to(torch.int8)


@pytest.mark.parametrize("n", SIZES)
def test_layout(n: int) -> None:
    fields = [int(code) + 1 for code in codes(n)]
    packed = ops.pack_ternary(codes(n)).tolist()
    assert len(packed) == -(-n // 4)
    for j, byte in enumerate(packed):
        own = fields[4 * j : 4 * j + 4]
        mask = (1 << 2 * len(own)) - 1
        assert byte & mask == sum(field << 2 * k for k, field in enumerate(own))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_round_trip(n: int, dtype: torch.dtype) -> None:
    unpacked = ops.unpack_ternary(ops.pack_ternary(codes(n)), n, dtype)
    assert unpacked.dtype == dtype
    assert torch.equal(unpacked, codes(n).to(dtype))


def test_packing_is_deterministic_past_the_end() -> None:
    """The unused bits of the last byte must not be left-over memory."""
    packed = {bytes(ops.pack_ternary(codes(5)).tolist()) for _ in range(20)}
    assert len(packed) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_codes_are_signs_or_zero(dtype: torch.dtype) -> None:
    x = torch.randn(4097, generator=torch.Generator().manual_seed(0)).to(dtype)
    drawn = ops.ternarize(x, x.abs().amax().float(), 1)
    assert drawn.dtype == torch.int8
    assert bool(((drawn == 0) | (drawn == torch.sign(x).to(torch.int8))).all())


def test_values_of_full_scale_and_zero_are_exact() -> None:
    x = torch.tensor([2.0, -2.0, 0.0, -0.0]).repeat(1000)
    assert torch.equal(ops.ternarize(x, torch.tensor(2.0), 1) * 2.0, x)


def test_a_zero_scale_gives_zeros() -> None:
    assert not ops.ternarize(torch.zeros(100), torch.tensor(0.0), 1).any()


def test_probability_is_proportional_to_magnitude() -> None:
    n = 40_000
    for share in (0.01, 0.3, 0.9):
        drawn = ops.ternarize(torch.full((n,), -share), torch.tensor(1.0), 9)
        # 5 standard deviations of a binomial share
        assert abs(-drawn.float().mean() - share) < 5 * (share * (1 - share) / n) ** 0.5

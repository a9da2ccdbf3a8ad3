"""Four bits per element: code + 8, the first element in the lower bits."""

from __future__ import annotations

import pytest
import torch

from commkit import ops

SIZES = (0, 1, 2, 3, 63, 64, 65, 4097)


def codes(n: int, top: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(-top, top + 1, (n,), generator=generator).to(torch.int8)


@pytest.mark.parametrize("n", SIZES)
def test_layout(n: int) -> None:
    fields = [int(code) + 8 for code in codes(n)]
    packed = ops.pack_nibbles(codes(n)).tolist()
    assert len(packed) == -(-n // 2)
    for j, byte in enumerate(packed):
        assert byte == sum(field << 4 * k for k, field in enumerate(fields[2 * j : 2 * j + 2]))


def test_every_code_comes_back() -> None:
    every = torch.arange(-8, 8, dtype=torch.int8)
    assert torch.equal(ops.unpack_nibbles(ops.pack_nibbles(every), 16, torch.int8), every)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8], ids=str)
@pytest.mark.parametrize(("bits", "top"), [(2, 1), (4, 7), (8, 127)])
@pytest.mark.parametrize("n", SIZES)
def test_round_trip_at_any_width(n: int, bits: int, top: int, dtype: torch.dtype) -> None:
    packed = ops.pack_codes(codes(n, top), bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-n * bits // 8)
    unpacked = ops.unpack_codes(packed, n, bits, dtype)
    assert unpacked.dtype == dtype
    assert torch.equal(unpacked, codes(n, top).to(dtype))
    unpacked.fill_(1)
    assert torch.equal(packed, ops.pack_codes(codes(n, top), bits)), "nothing is shared"

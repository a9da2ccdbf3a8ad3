"""One bit per element: the layout is numpy's little-endian packbits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from commkit import ops

SIZES = (0, 1, 7, 8, 9, 63, 64, 65, 4097)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def values(n: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    x[::5] = 0.0
    x[1::7] = -0.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_layout_is_that_of_packbits(n: int, dtype: torch.dtype) -> None:
    x = values(n, dtype)
    expected = np.packbits((x >= 0).numpy(), bitorder="little")
    packed = ops.pack_signs(x)
    assert packed.dtype == torch.uint8
    assert np.array_equal(packed.numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_round_trip_gives_the_signs(n: int, dtype: torch.dtype) -> None:
    x = values(n, torch.float32)
    signs = ops.unpack_signs(ops.pack_signs(x), n, dtype)
    assert signs.dtype == dtype
    assert torch.equal(signs, torch.where(x >= 0, 1.0, -1.0).to(dtype))


def test_unpacking_reads_any_byte() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    bits = np.unpackbits(every.numpy(), bitorder="little").astype(np.float32)
    signs = ops.unpack_signs(every, 2048, torch.float32)
    assert np.array_equal(signs.numpy(), bits * 2 - 1)


def test_the_result_is_the_callers_own() -> None:
    bits = ops.pack_signs(values(16, torch.float32))
    first = ops.unpack_signs(bits, 16, torch.float32)
    expected = first.clone()
    first.mul_(3)
    assert torch.equal(ops.unpack_signs(bits, 16, torch.float32), expected)


def test_a_slice_of_a_larger_tensor_packs_like_a_copy() -> None:
    x = values(100, torch.float32)
    assert torch.equal(ops.pack_signs(x[3:83]), ops.pack_signs(x[3:83].clone()))

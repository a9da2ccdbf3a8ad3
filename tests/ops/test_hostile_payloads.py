"""Whatever arrives from a peer, the compiled decoders write into their output alone, or refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from commkit import ops
from commkit.compressors.dct_topk import dct_basis
from commkit.ops import binding

from .native_levels import needs_native

pytestmark = needs_native

CPU = torch.device("cpu")
GUARD = 64
CANARY = -7.25
E3M0 = 3  # of csrc/kernels.h
sizes = st.integers(0, 300)
seeds = st.integers(0, 2**32 - 1)
hostile = settings(max_examples=60, deadline=None, derandomize=True, database=None)
REFUSALS = (IndexError, ValueError, RuntimeError)


class Guarded:
    """An output between two walls."""

    def __init__(self, numel: int) -> None:
        self._all = torch.full((numel + 2 * GUARD,), CANARY)
        self.out = self._all[GUARD : GUARD + numel]
        self.out.zero_()

    def require_whole(self) -> None:
        numel = self.out.numel()
        assert bool((self._all[:GUARD] == CANARY).all())
        assert bool((self._all[GUARD + numel :] == CANARY).all())


def noise(seed: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Any bits: of floats also NaN, infinities and subnormal numbers."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (numel * dtype.itemsize,), generator=generator).to(torch.uint8)
    # Of exactly its length: what is read behind its end is found by the address sanitizer.
    return data.view(dtype) if numel else torch.empty(0, dtype=dtype)


@hostile
@given(sizes, st.integers(1, 4), seeds, st.booleans())
def test_signs(n: int, rows: int, seed: int, accumulate: bool) -> None:
    guarded = Guarded(n)
    bits = [noise(seed + row, (n + 7) // 8, torch.uint8) for row in range(rows)]
    scales = noise(seed, rows, torch.float32)
    binding.run("ck_sum_signs", guarded.out, n, bits, scales, rows, accumulate)
    guarded.require_whole()


@hostile
@given(
    sizes, st.integers(1, 4), st.sampled_from([2, E3M0, 4, 8]), st.sampled_from([4, 16, 256, 1024]),
    seeds, st.booleans(),
)  # fmt: skip
def test_blocks(n: int, rows: int, code: int, block: int, seed: int, accumulate: bool) -> None:
    guarded, width = Guarded(n), 4 if code == E3M0 else code
    codes = [noise(seed + row, (n * width + 7) // 8, torch.uint8) for row in range(rows)]
    scales = [noise(seed - row, (n + block - 1) // block, torch.float32) for row in range(rows)]
    binding.run("ck_sum_blocks", guarded.out, n, codes, scales, rows, code, block, rows, accumulate)
    guarded.require_whole()


@hostile
@given(st.lists(sizes, min_size=1, max_size=4), st.integers(1, 4), seeds, st.booleans())
def test_signs_of_many(ns: list[int], rows: int, seed: int, accumulate: bool) -> None:
    guarded = [Guarded(n) for n in ns]
    outs = [each.out for each in guarded]
    bits = [noise(seed + row, sum((n + 7) // 8 for n in ns), torch.uint8) for row in range(rows)]
    scales = noise(seed, rows * len(ns), torch.float32).view(rows, len(ns))
    decode = ops.foreach_accumulate_signs_ if accumulate else ops.foreach_write_signs_
    decode(outs, bits, scales)
    for each in guarded:
        each.require_whole()


def _indices(n: int, seed: int, k: int, dtype: torch.dtype, wild: bool) -> Tensor:
    if wild:
        return noise(seed, k, dtype)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, n + 1, (k,), generator=generator).to(dtype)  # off by one


@hostile
@given(sizes, st.integers(0, 64), st.sampled_from([torch.int32, torch.int64]), seeds, st.booleans())
def test_indices(n: int, k: int, dtype: torch.dtype, seed: int, wild: bool) -> None:
    guarded, indices = Guarded(n), _indices(n, seed, k, dtype, wild)
    values = noise(seed, k, torch.float32)
    refused = binding.call(
        "ck_scatter_accumulate", guarded.out, n, indices, indices.element_size(), values, k
    )
    guarded.require_whole()
    inside = bool(((indices >= 0) & (indices < n)).all())
    assert (refused == 0) == inside


@hostile
@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 17), st.integers(1, 3),
    seeds, st.booleans(),
)  # fmt: skip
def test_tiles(
    rows: int, height: int, columns: int, width: int, payloads: int, seed: int, wild: bool
) -> None:
    size, tiles = height * width, rows * columns
    k = min(4, size)
    guarded = Guarded(tiles * size)
    places = [
        _indices(size, seed + row, tiles * k, torch.int16, wild).view(tiles, k)
        for row in range(payloads)
    ]
    values = [noise(seed - row, tiles * k, torch.float32).view(tiles, k) for row in range(payloads)]
    bases = dct_basis(height, torch.float32, CPU), dct_basis(width, torch.float32, CPU)
    refused = binding.run(
        "ck_combine_tiles",
        *(guarded.out, rows, height, columns, width, places, values, payloads, k, *bases, False),
    )
    guarded.require_whole()
    inside = all(bool(((p >= 0) & (p < size)).all()) for p in places)
    assert (refused == 0) == inside


def _cut(x: Tensor, by: int) -> Tensor:
    return x.reshape(-1)[: max(0, x.numel() - by)].clone()


def _calls(out: Tensor, seed: int, by: int) -> Iterator[Callable[[], Any]]:
    """Every decoder, with one part of its payload too short or too long by ``by``."""
    n, block = out.numel(), 16
    bits, scales = noise(seed, (n + 7) // 8, torch.uint8), torch.ones(1)
    codes, ones = noise(seed, (n + 1) // 2, torch.uint8), torch.ones((n + block - 1) // block)
    places = torch.zeros(1, 3, dtype=torch.int16)
    bases = torch.eye(1), torch.eye(n)

    def wrong(x: Tensor) -> Tensor:
        return _cut(x, by) if by > 0 else torch.cat([x.reshape(-1), x.reshape(-1)[:1]])

    yield lambda: ops.write_signs_(out, [wrong(bits)], scales)
    yield lambda: ops.accumulate_signs_(out, [bits], wrong(scales))
    yield lambda: ops.foreach_write_signs_([out], [wrong(bits)], scales.view(1, 1))
    yield lambda: ops.foreach_accumulate_signs_([out], [bits], wrong(scales).view(1, -1))
    yield lambda: ops.write_blocks_(out, [wrong(codes)], [ones], 4, block, 1)
    yield lambda: ops.accumulate_blocks_(out, [codes], [wrong(ones)], 4, block, 1)
    yield lambda: ops.write_e3m0_(out, [wrong(codes)], [ones], block, 1)
    yield lambda: ops.accumulate_e3m0_(out, [codes], [wrong(ones)], block, 1)
    yield lambda: ops.scatter_accumulate_(out, torch.arange(3), wrong(torch.ones(3)))
    yield lambda: ops.combine_tiles_(out, [places], [wrong(torch.ones(1, 3))], *bases, 1, False)


@hostile
@given(st.integers(17, 200), seeds, st.sampled_from([1, -1]))
def test_lengths(n: int, seed: int, by: int) -> None:
    guarded = Guarded(n)
    for number, call in enumerate(_calls(guarded.out, seed, by)):
        with pytest.raises(REFUSALS):
            print("accepted:", number, call())
        guarded.require_whole()

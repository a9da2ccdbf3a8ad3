"""Compiled kernels of codes in a table against the reference: the same bits, whatever the length, the alignment, the
dtype, the number of threads and the instruction set."""

from __future__ import annotations

import pytest
import torch

from commkit import ops
from commkit.compressors.dynamic_tree import dynamic_levels
from commkit.ops import native, reference

from .native_levels import needs_native, running
from .test_native import DTYPES, LENGTHS, LONG, assert_same, every_level, finite, values

pytestmark = needs_native

TREE = dynamic_levels(torch.device("cpu"))
BOOKS = {
    "tree": TREE,
    "two": torch.tensor([-1.0, 0.5]),
    "uneven": torch.tensor([-3.0, -0.25, -1e-30, 0.0, 0.125, 7.0, 7.5]),
    "wide": torch.linspace(-1, 1, 255) ** 3,
}
BLOCKS = (1, 7, 64, 256, 3000)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
rounding = pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])


def octaves(n: int, lowest: int, highest: int) -> torch.Tensor:
    """Of every size between two powers of two, powers themselves and zeros among them, from an odd address."""
    generator = torch.Generator().manual_seed(n)
    sizes = 2.0 ** torch.randint(lowest, highest, (n + 1,), generator=generator).double()
    sizes *= 1 + torch.rand(n + 1, generator=generator).double() * (torch.arange(n + 1) % 3 > 0)
    sizes[::11] = 0
    signs = torch.where(torch.arange(n + 1) % 2 == 0, 1.0, -1.0)
    return (sizes * signs).float()[1:]


def test_the_operators_are_served() -> None:
    wanted = {"quantize_codebook", "dequantize_codebook", "quantize_natural", "dequantize_natural"}
    assert wanted <= native.served()


@every_level
@every_dtype
@rounding
@pytest.mark.parametrize("book", BOOKS)
def test_codes_of_a_codebook(book: str, stochastic: bool, dtype: torch.dtype, level: str) -> None:
    levels = BOOKS[book]
    for n in LENGTHS:
        x, block_size = finite(n, dtype), BLOCKS[n % len(BLOCKS)]
        with running(level):
            got = ops.quantize_codebook(x, levels, block_size, stochastic, 5)
        wanted = reference.quantize_codebook(x, levels, block_size, stochastic, 5)
        assert_same(got, wanted)
        with running(level):
            again = ops.dequantize_codebook(got[0], levels, got[1], block_size)
        assert_same(again, reference.dequantize_codebook(*got[:1], levels, got[1], block_size))


@every_level
@rounding
@pytest.mark.parametrize(
    "factor",
    [0.0, -0.0, 1e-44, 1e-39, 1e30],
    ids=["zero", "minus zero", "least", "denormal", "large"],
)
@pytest.mark.parametrize("shift", [0.0, 9.0, -9.0], ids=["both", "above", "below"])
def test_codes_of_blocks_at_the_ends_of_the_range(
    shift: float, factor: float, stochastic: bool, level: str
) -> None:
    x = (finite(1000) + shift) * factor
    with running(level):
        got = ops.quantize_codebook(x, TREE, 64, stochastic, 5)
    assert_same(got, reference.quantize_codebook(x, TREE, 64, stochastic, 5))


@every_level
@every_dtype
def test_natural_codes(dtype: torch.dtype, level: str) -> None:
    for n in LENGTHS:
        x = finite(n, dtype)
        with running(level):
            codes, top = got = ops.quantize_natural(x, 5)
        assert_same(got, reference.quantize_natural(x, 5))
        for out in (torch.float32, torch.float64):
            with running(level):
                again = ops.dequantize_natural(codes, top, out)
            assert_same(again, reference.dequantize_natural(codes, top, out))


@every_level
@pytest.mark.parametrize(
    ("lowest", "highest"),
    [(-149, 127), (-149, -120), (-126, 0), (-149, -148), (0, 127), (-5, 6)],
    ids=str,
)
def test_natural_codes_of_every_size(lowest: int, highest: int, level: str) -> None:
    x = octaves(40_001, lowest, highest)
    with running(level):
        got = codes, top = ops.quantize_natural(x, 2**50 + 3)
        assert_same(
            ops.dequantize_natural(codes, top, torch.float32),
            reference.dequantize_natural(codes, top, torch.float32),
        )
    assert_same(got, reference.quantize_natural(x, 2**50 + 3))


@every_level
@pytest.mark.parametrize(
    "x",
    [torch.zeros(100), torch.zeros(0), -torch.zeros(9), torch.full((5,), 3e38)],
    ids=["zeros", "none", "minus zeros", "too large"],
)
def test_natural_codes_of_nothing_and_of_too_much(x: torch.Tensor, level: str) -> None:
    with running(level):
        got = ops.quantize_natural(x, 5)
    assert_same(got, reference.quantize_natural(x, 5))


@every_level
def test_what_is_not_finite_is_left_to_the_reference(level: str) -> None:
    x = values(3000)
    with running(level):
        book, natural = ops.quantize_codebook(x, TREE, 64, True, 5), ops.quantize_natural(x, 5)
    assert_same(book, reference.quantize_codebook(x, TREE, 64, True, 5))
    assert_same(natural, reference.quantize_natural(x, 5))


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_any_number_of_threads(threads: int) -> None:
    x = finite(LONG)
    with running("", threads):
        book, natural = ops.quantize_codebook(x, TREE, 256, True, 5), ops.quantize_natural(x, 5)
        values_of_book = ops.dequantize_codebook(book[0], TREE, book[1], 256)
        values_of_natural = ops.dequantize_natural(*natural, torch.float32)
    assert_same(book, reference.quantize_codebook(x, TREE, 256, True, 5))
    assert_same(natural, reference.quantize_natural(x, 5))
    assert_same(values_of_book, reference.dequantize_codebook(book[0], TREE, book[1], 256))
    assert_same(values_of_natural, reference.dequantize_natural(*natural, torch.float32))


def test_a_code_beyond_the_levels_is_refused() -> None:
    with pytest.raises(IndexError):
        ops.dequantize_codebook(
            torch.tensor([7], dtype=torch.uint8), BOOKS["uneven"], torch.ones(1), 4
        )

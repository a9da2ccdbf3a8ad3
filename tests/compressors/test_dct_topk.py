"""DCT top-k: the transform, tiles, what is picked, and how ranks' picks are combined."""

from __future__ import annotations

import math

import pytest
import torch

from commkit.compressors import DCTTopK
from commkit.compressors.dct_topk import dct_basis
from commkit.types import TensorCtx

from .inputs import ctx_of, sample, transmit

CPU = torch.device("cpu")
ALL = 10**6


def matrix(rows: int, columns: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return sample(rows * columns, seed, dtype).view(rows, columns)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 181])
@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_the_basis_is_orthonormal(size: int, dtype: torch.dtype, eps: float) -> None:
    basis = dct_basis(size, dtype, CPU)
    assert basis.dtype == dtype
    # rounding of the entries, 181 of them in a sum
    assert float((basis @ basis.T - torch.eye(size, dtype=dtype)).abs().max()) < eps * 20


def test_rows_of_the_basis_are_the_cosines_of_dct_2() -> None:
    basis = dct_basis(5, torch.float64, CPU)
    for k in range(5):
        scale = math.sqrt((1 if k == 0 else 2) / 5)
        row = [scale * math.cos(math.pi * (2 * n + 1) * k / 10) for n in range(5)]
        torch.testing.assert_close(basis[k], torch.tensor(row, dtype=torch.float64))


def by_hand(x: torch.Tensor, height: int, width: int, k: int) -> torch.Tensor:
    """Every tile by itself: transform, keep the k largest, transform back."""
    out = torch.zeros_like(x)
    tall, wide = (dct_basis(s, torch.float64, CPU) for s in (height, width))
    for i in range(0, x.shape[0], height):
        for j in range(0, x.shape[1], width):
            coefficients = tall @ x[i : i + height, j : j + width] @ wide.T
            cut = coefficients.abs().view(-1).sort(descending=True).values[k - 1]
            kept = coefficients * (coefficients.abs() >= cut)
            out[i : i + height, j : j + width] = tall.T @ kept @ wide
    return out


@pytest.mark.parametrize(
    ("shape", "chunk", "tile"),
    [
        ((128, 192), 64, (64, 64)),
        ((48, 10), 64, (48, 10)),
        ((100, 66), 64, (50, 33)),
        ((30, 30), 8, (6, 6)),
        ((67, 128), 64, (1, 64)),
        ((360, 4), 181, (180, 4)),
    ],
)
def test_a_tile_s_largest_coefficients_are_sent(shape, chunk: int, tile) -> None:
    """Sides of tiles are the largest divisors up to the chunk."""
    x, k = matrix(*shape), 5
    expected = by_hand(x, *tile, k)
    # float32 on the wire, of coefficients below 20
    torch.testing.assert_close(transmit(DCTTopK(k, chunk, "fp32"), x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "seen_as"), [((8, 4, 3, 3), (8, 36)), ((6, 5, 4), (6, 20)), ((240,), (1, 240))]
)
def test_other_dimensions_are_seen_as_a_matrix(shape, seen_as) -> None:
    x = sample(math.prod(shape), dtype=torch.float64)
    compressor = DCTTopK(3, 64, "fp32")
    a, b = transmit(compressor, x.view(shape)), transmit(compressor, x.view(seen_as))
    assert torch.equal(a.view(-1), b.view(-1))


def test_a_pattern_of_k_cosines_costs_k_numbers() -> None:
    coefficients = torch.zeros(64, 64, dtype=torch.float64)
    coefficients[0, 0], coefficients[1, 2], coefficients[40, 3] = 3.0, -2.0, 0.5
    x = dct_basis(64, torch.float64, CPU).T @ coefficients @ dct_basis(64, torch.float64, CPU)
    torch.testing.assert_close(transmit(DCTTopK(3), x), x, rtol=0, atol=1e-14)
    assert float((transmit(DCTTopK(2), x) - x).norm()) == pytest.approx(0.5)


def test_all_coefficients_give_the_tensor_back() -> None:
    x = matrix(64, 128)
    ctx = ctx_of(x)
    compressor = DCTTopK(ALL, 64, "bf16")
    assert compressor.shrinks(ctx)
    places, values = compressor.compress(x, ctx)
    # float64 in, so that the rounding of values to bfloat16 is all that is lost
    assert float((transmit(compressor, x) - x).norm() / x.norm()) < 2**-9
    assert values.numel() == x.numel()
    assert all(torch.equal(row.sort().values, torch.arange(4096).short()) for row in places)


@pytest.mark.parametrize(
    ("shape", "top_k", "values", "dtype", "payload"),
    [
        ((4096, 4096), 32, "bf16", torch.float32, 4096 * 4096 // 4096 * 32 * 4),  # 0.5 MiB
        ((4096, 4096), 32, "fp32", torch.float32, 4096 * 32 * 6),
        ((64,), 32, "bf16", torch.float32, 128),
        ((64,), 32, "bf16", torch.bfloat16, 128),  # no smaller, so sent as it is
        ((64,), 32, "fp32", torch.bfloat16, 128),
        ((64,), 43, "fp32", torch.float32, 256),
        ((4099,), 32, "bf16", torch.float32, 4 * 4099),  # a prime
        ((67, 71), 32, "bf16", torch.float32, 4 * 67 * 71),
        ((), 32, "bf16", torch.float32, 4),
        ((0,), 32, "bf16", torch.float32, 0),
        ((3, 0), 32, "bf16", torch.float32, 0),
        ((0, 3), 32, "bf16", torch.float32, 0),
    ],
)
def test_payload_bytes_never_exceed_the_tensor(shape, top_k, values, dtype, payload: int) -> None:
    ctx = TensorCtx("w", torch.Size(shape), dtype, CPU, 0, 0)
    compressor = DCTTopK(top_k, 64, values)
    assert compressor.payload_bytes(ctx) == payload <= ctx.numel * dtype.itemsize
    if ctx.numel < 10**6:
        sent = compressor.compress(torch.ones(shape, dtype=dtype), ctx)
        assert sum(t.numel() * t.element_size() for t in sent) == payload


def test_what_would_not_shrink_is_sent_exactly_and_averaged() -> None:
    xs = [matrix(67, 71, seed, torch.float32) for seed in range(3)]
    compressor, ctx = DCTTopK(), ctx_of(xs[0])
    payloads = [compressor.compress(x, ctx) for x in xs]
    assert torch.equal(compressor.decompress(payloads[0], ctx), xs[0])
    mean = torch.stack(xs).mean(0)
    torch.testing.assert_close(compressor.combine(payloads, ctx), mean)


def coefficients_of(x: torch.Tensor) -> torch.Tensor:
    return dct_basis(x.shape[0], x.dtype, CPU) @ x @ dct_basis(x.shape[1], x.dtype, CPU).T


def test_a_coefficient_is_the_mean_of_those_who_sent_it() -> None:
    tall, wide = (dct_basis(s, torch.float64, CPU) for s in (16, 24))
    a, b, c = (torch.zeros(16, 24, dtype=torch.float64) for _ in range(3))
    a[0, 1], a[2, 3] = 8.0, -4.0
    b[0, 1], b[5, 6] = 2.0, 3.0
    compressor = DCTTopK(2, 64, "fp32")
    ctx = ctx_of(a)
    payloads = [compressor.compress(tall.T @ x @ wide, ctx) for x in (a, b, c)]
    combined = coefficients_of(compressor.combine(payloads, ctx))
    expected = torch.zeros_like(a)
    expected[0, 1], expected[2, 3], expected[5, 6] = 5.0, -4.0, 3.0
    torch.testing.assert_close(combined, expected, rtol=0, atol=1e-6)


def test_combining_has_the_same_bits_wherever_it_is_done() -> None:
    xs = [matrix(128, 64, seed, torch.float32) for seed in range(4)]
    compressor, ctx = DCTTopK(8), ctx_of(xs[0])
    payloads = [compressor.compress(x, ctx) for x in xs]
    first, again = (compressor.combine(list(payloads), ctx) for _ in range(2))
    assert torch.equal(first, again)


def test_the_mean_of_senders_exists_where_their_sum_does_not() -> None:
    """Coefficients near the end of float32 (a tile of one row: the largest is sqrt(8) times an element)."""
    x = torch.full((1, 64), 3e37).view(8, 8)
    compressor, ctx = DCTTopK(4, 64, "fp32"), ctx_of(x)
    payloads = [compressor.compress(x, ctx) for _ in range(4)]
    assert float(payloads[0][1].abs().max()) > 2e38
    torch.testing.assert_close(compressor.combine(payloads, ctx), x, rtol=1e-5, atol=0)


def test_places_fit_sixteen_bits() -> None:
    x = matrix(181, 181)
    places, _ = DCTTopK(ALL, 181, "bf16").compress(x, ctx_of(x))
    assert places.dtype == torch.int16
    assert (int(places.min()), int(places.max())) == (0, 181 * 181 - 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DCTTopK(0), "top_k=0 must be >= 1"),
        (lambda: DCTTopK(chunk=1), r"chunk=1 must be in \[2, 181\]"),
        (lambda: DCTTopK(chunk=182), r"chunk=182 must be in \[2, 181\]"),
        (lambda: DCTTopK(values="fp8"), "values='fp8' must be"),
    ],
)
def test_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

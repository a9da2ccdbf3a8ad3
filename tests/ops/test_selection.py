"""Choosing elements: sampled thresholds, stratified indices, and adding them up again."""

from __future__ import annotations

import math

import pytest
import torch

from commkit import ops

CPU = torch.device("cpu")


def heavy_tailed(n: int) -> torch.Tensor:
    """Cubes of Laplace variates: a few elements hold nearly all of the norm."""
    u = torch.rand(n, generator=torch.Generator().manual_seed(3)) - 0.5
    return (torch.sign(u) * torch.log1p(-2 * u.abs())) ** 3


def gaussian(n: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
@pytest.mark.parametrize(("n", "k"), [(200_000, 200), (200_000, 2000), (100_003, 100)])
def test_sampled_threshold_is_near_the_kth_magnitude(make, n: int, k: int, seed: int) -> None:
    x = make(n)
    selected = int((x.abs() >= ops.sample_threshold(x, k, seed)).sum())
    # The sample holds at least 64 elements above it, so the rank's deviation is at most 1/8: 5 of them.
    assert k * (1 - 5 / 8) <= selected <= k * (1 + 5 / 8) + 1


@pytest.mark.parametrize("k", [1, 5, 50])
def test_threshold_of_a_small_tensor_is_exact(k: int) -> None:
    x = gaussian(50)
    assert ops.sample_threshold(x, k, 11) == x.abs().sort(descending=True).values[k - 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_threshold_of_other_dtypes(dtype: torch.dtype) -> None:
    x = gaussian(100_000).to(dtype)
    threshold = ops.sample_threshold(x, 1000, 0)
    assert threshold.dtype == torch.float32
    assert 500 <= int((x.abs() >= threshold).sum()) <= 1700


@pytest.mark.parametrize(
    ("n", "k"), [(0, 0), (1, 1), (7, 1), (7, 7), (100, 99), (4097, 41), (10**6, 1000)]
)
def test_stratified_indices_increase_one_per_stratum(n: int, k: int) -> None:
    indices = ops.stratified_indices(n, k, 5, CPU)
    assert indices.dtype == torch.int64
    assert indices.shape == (k,)
    for j, index in enumerate(indices.tolist()):
        assert j * n // k <= index < (j + 1) * n // k
    assert bool((indices.diff() > 0).all())


def test_stratified_indices_choose_every_element_equally_often() -> None:
    n, k, draws = 23, 5, 2000
    counts = torch.zeros(n)
    for seed in range(draws):
        counts[ops.stratified_indices(n, k, seed, CPU)] += 1
    for j in range(k):
        start, end = j * n // k, (j + 1) * n // k
        share = 1 / (end - start)
        spread = math.sqrt(draws * share * (1 - share))
        assert (counts[start:end] - draws * share).abs().max() < 5 * spread


def test_strata_are_drawn_independently() -> None:
    """The offsets inside two strata must not move together."""
    draws = [ops.stratified_indices(2000, 2, seed, CPU).tolist() for seed in range(1500)]
    correlation = torch.corrcoef(torch.tensor(draws, dtype=torch.float64).T)[0, 1]
    assert abs(correlation) < 5 / math.sqrt(len(draws))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scatter_accumulate_adds_in_place(index_dtype, value_dtype) -> None:
    out = torch.arange(6.0)
    indices = torch.tensor([4, 0], dtype=index_dtype)
    ops.scatter_accumulate_(out, indices, torch.tensor([0.5, 2.0], dtype=value_dtype))
    assert out.tolist() == [2.0, 1.0, 2.0, 3.0, 4.5, 5.0]
    ops.scatter_accumulate_(out, indices[:0], torch.empty(0, dtype=value_dtype))
    assert out.tolist() == [2.0, 1.0, 2.0, 3.0, 4.5, 5.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (3, 7), (5, 64), (2, 4096), (1, 20_000)])
def test_the_largest_of_each_row_in_rising_order(rows: int, n: int, dtype: torch.dtype) -> None:
    x = gaussian(rows * n).view(rows, n).to(dtype)  # bfloat16 has many equal ones
    for k in sorted({1, min(n, 32), n // 2, n}):
        found = ops.largest_of_rows(x, k)
        assert found.dtype == torch.int64
        for row, places in zip(x, found.tolist(), strict=True):
            order = sorted(range(n), key=lambda i: (-abs(float(row[i])), i))
            assert places == sorted(order[:k])


def test_nan_is_above_all_and_the_first_of_equals_are_taken() -> None:
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([[0.0, nan, 1.0, -inf, inf, nan], [2.0, -2.0, 2.0, 1.0, -2.0, 0.0]])
    assert ops.largest_of_rows(x, 3).tolist() == [[1, 3, 5], [0, 1, 2]]
    assert ops.largest_of_rows(x, 1).tolist() == [[1], [0]]
    assert ops.largest_of_rows(torch.zeros(2, 5000), 2).tolist() == [[0, 1], [0, 1]]


def test_what_is_not_a_number_is_always_selected() -> None:
    x = torch.tensor([1.0, torch.nan, -3.0, torch.inf])
    assert ops.select_at_least(x, torch.tensor(2.0)).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("x", "k", "error", "words"),
    [
        (torch.ones(3), 1, ValueError, r"x has shape \(3,\) and must be 2-D"),
        (torch.ones(3, 3).long(), 1, TypeError, "x is of torch.int64"),
        (torch.ones(3, 4), 5, ValueError, "k=5 must be from 0 to the 4"),
        (torch.ones(3, 4), -1, ValueError, "k=-1"),
    ],
)
def test_what_has_no_such_rows_is_refused(x, k: int, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        ops.largest_of_rows(x, k)

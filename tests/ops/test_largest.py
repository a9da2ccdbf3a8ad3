"""The largest elements, where the sample that guides the search misleads it too."""

from __future__ import annotations

import pytest
import torch

from commkit import ops
from commkit.ops import reference, selection

from .native_levels import levels, running
from .test_dgc_step import SEED, TOTALS, K
from .test_native import assert_same, finite


def wanted(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Everything is sorted."""
    places = reference.largest_of_rows(x.view(1, -1), k)[0]
    return places, x[places].to(torch.promote_types(x.dtype, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", TOTALS)
def test_whatever_the_sample_says(name: str, dtype: torch.dtype) -> None:
    x = TOTALS[name]().to(dtype)
    assert_same(reference.largest(x, K, SEED), wanted(x, K))
    for level in levels():
        with running(level):
            assert_same(ops.largest(x, K, SEED), wanted(x, K))


@pytest.mark.skipif(not levels(), reason="threads are those of the compiled kernels")
@pytest.mark.parametrize("name", TOTALS)
def test_on_any_number_of_threads(name: str) -> None:
    special = TOTALS[name]()
    rest = finite((1 << 20) + 5)  # enough for seven
    for x in (torch.cat([rest, special]), torch.cat([special, rest])):
        for threads in (1, 2, 7):
            with running("", threads):
                assert_same(ops.largest(x, x.numel() // 50, 3), wanted(x, x.numel() // 50))


@pytest.mark.parametrize("factor", [0.0, 0.3, 0.9, 1.5, 1e6, torch.inf, torch.nan])
def test_a_bad_threshold_of_the_reference(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Too low: far more than k are above it, and what is cut is cut by magnitude, wherever it stands. Too high:
    it is lowered, and where ten tries are not enough everything is sorted."""
    x = finite(5000)
    x = x[x.abs().argsort()]  # the largest come last
    threshold = x[-50].abs() * factor
    monkeypatch.setattr(selection, "sample_threshold", lambda x, k, seed: threshold)
    assert_same(reference.largest(x, 50, 1), wanted(x, 50))


def test_a_wrong_argument_is_named() -> None:
    x = torch.ones(4)
    with pytest.raises(ValueError, match="k=5"):
        ops.largest(x, 5, 0)
    with pytest.raises(ValueError, match="x has shape"):
        ops.largest(x.view(2, 2), 1, 0)
    with pytest.raises(TypeError, match="x is of"):
        ops.largest(x.long(), 1, 0)

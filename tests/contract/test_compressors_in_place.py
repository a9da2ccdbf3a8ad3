"""The ways around temporaries give the bits of the plain ways, and who says that inf and NaN show, shows
them."""

from __future__ import annotations

import pytest
import torch

from .compressor_cases import CASES, CompressorCase, ctx_of, sample

every_compressor = pytest.mark.parametrize("case", CASES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])


@every_compressor
@every_dtype
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_combine_into_writes_what_combine_returns(
    case: CompressorCase, dtype: torch.dtype, ranks: int
) -> None:
    compressor = case.build()
    xs = [sample((4097,), dtype, seed=s) for s in range(ranks)]
    ctx = ctx_of(xs[0])
    payloads = [compressor.compress(x, ctx, salt) for salt, x in enumerate(xs)]
    memory = torch.full((4100,), torch.nan, dtype=ctx.work_dtype)
    compressor.combine_into(memory[2:4099], payloads, ctx)
    assert torch.equal(memory[2:4099], compressor.combine(payloads, ctx))
    assert bool(memory[[0, 1, 4099]].isnan().all())


@every_compressor
@every_dtype
def test_subtracting_is_bit_for_bit(case: CompressorCase, dtype: torch.dtype) -> None:
    compressor, x = case.build(), sample((4097,), dtype)
    ctx = ctx_of(x)
    payload = compressor.compress(x, ctx)
    left = x.to(ctx.work_dtype, copy=True)
    expected = left - compressor.decompress(payload, ctx)
    compressor.subtract_(left, payload, ctx)
    assert torch.equal(left, expected)


@pytest.mark.parametrize("case", [c for c in CASES if c.build().shows_nonfinite], ids=str)
@every_dtype
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("place", [0, 100, 4095, 4096])
def test_what_is_not_finite_shows(
    case: CompressorCase, dtype: torch.dtype, bad: float, place: int
) -> None:
    x = sample((4097,), dtype)
    x[place] = bad
    payload = case.build().compress(x, ctx_of(x))
    assert not all(t.isfinite().all() for t in payload if t.is_floating_point())

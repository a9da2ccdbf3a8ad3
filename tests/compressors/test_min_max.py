"""MinMax beyond the contract: what its roundings promise."""

from __future__ import annotations

import pytest
import torch

from commkit.compressors import MinMax

from ..contract.compressor_cases import ctx_of, sample, transmit


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rounding", ["shift", "nearest"])
def test_errors_are_at_most_half_a_step(bits, rounding):
    x = sample((4096,))
    code = MinMax(bits, 1024, rounding)
    buckets = x.view(-1, 1024)
    step = (buckets.amax(1) - buckets.amin(1)) / (2**bits - 1)
    for salt in range(5):
        error = (transmit(code, x, salt) - x).view(-1, 1024).abs().amax(1)
        assert bool((error <= step / 2 * 1.0001).all())


def test_a_shifted_lattice_has_half_the_variance_of_stochastic_rounding():
    x = sample((1 << 16,))
    variance = {}
    for rounding in ("shift", "stochastic"):
        code = MinMax(4, 1024, rounding)
        errors = torch.stack([transmit(code, x, salt) - x for salt in range(8)])
        variance[rounding] = float(errors.square().mean())
    step = float((x.view(-1, 1024).amax(1) - x.view(-1, 1024).amin(1)).div(15).square().mean())
    assert variance["shift"] == pytest.approx(step / 12, rel=0.03)
    assert variance["stochastic"] == pytest.approx(step / 6, rel=0.03)


@pytest.mark.parametrize("value", [0.0, 3.7, -1e30, 1e-30])
@pytest.mark.parametrize("rounding", ["shift", "stochastic", "nearest"])
def test_a_constant_bucket_is_exact(value, rounding):
    x = torch.full((1500,), value)
    assert torch.equal(transmit(MinMax(4, 1024, rounding), x), x)


def test_a_short_last_bucket_keeps_its_own_range():
    x = torch.cat([torch.full((1024,), 1000.0), torch.linspace(0, 1e-3, 5)])
    error = (transmit(MinMax(8, 1024, "nearest"), x) - x).abs()
    assert float(error[1024:].max()) <= 1e-3 / 255


def test_the_widest_range_of_float32_is_no_overflow():
    x = torch.tensor([-3e38, 3e38, 0.0, 1e38])
    assert bool(transmit(MinMax(8, 4, "nearest"), x).isfinite().all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_arrives_as_such(bad):
    x = sample((2048,))
    x[1500] = bad
    back = transmit(MinMax(8, 1024), x)
    assert bool(back[:1024].isfinite().all())
    assert not bool(back[1024:].isfinite().all())


def test_payload_is_codes_and_ranges():
    x = sample((2500,))
    codes, ranges = MinMax(4, 1000).compress(x, ctx_of(x))
    assert (codes.dtype, codes.numel()) == (torch.uint8, 1250)
    assert ranges.shape == (3, 2)

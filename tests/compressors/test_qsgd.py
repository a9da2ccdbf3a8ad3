"""QSGD: levels of a bucket's norm, and the paper's bound on what rounding adds."""

from __future__ import annotations

import pytest
import torch

from commkit.compressors import QSGD

from .inputs import ctx_of, sample, transmit


@pytest.mark.parametrize(
    ("bits", "x", "codes"),
    [
        (2, [0.0, 0.0, -2.0, 0.0], [0b01_00_01_01]),
        (4, [3.0, -4.0, 0.0, 0.0], [(3 + 8) | (-4 + 8) << 4, 8 | 8 << 4]),
        (8, [3.0, -4.0, 0.0, 0.0], [3, 256 - 4, 0, 0]),
    ],
)
def test_golden_payload(bits, x: list[float], codes: list[int]) -> None:
    """A 2-norm of 5 and 5 levels: a scale of 1, on which nothing is left to chance."""
    compressor = QSGD(bits, 4, levels=1 if bits == 2 else 5)
    packed, scales = compressor.compress(torch.tensor(x), ctx_of(torch.tensor(x)))
    assert packed.tolist() == codes
    assert scales.tolist() == [2.0 if bits == 2 else 1.0]
    assert transmit(compressor, torch.tensor(x)).tolist() == x


@pytest.mark.parametrize("norm", ["l2", "max"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_decoded_is_a_neighbouring_level(bits, norm) -> None:
    x = sample(1000) ** 3
    compressor = QSGD(bits, 64, norm)
    _, scales = compressor.compress(x, ctx_of(x))
    scale = scales.repeat_interleave(64)[:1000]
    y, sent = x.double() / scale.double(), transmit(compressor, x).double() / scale.double()
    # two roundings in float32 of levels up to 127, of which one level at most is decided by them
    slack = 127 * 2.0**-22
    assert bool(((sent - sent.round()).abs() <= slack).all())
    assert bool((sent.abs() <= compressor.s + slack).all())
    assert bool(((sent - y).abs() < 1 + slack).all())


@pytest.mark.parametrize("norm", ["l2", "max"])
def test_every_bucket_has_its_own_norm_and_the_last_one_ends_early(norm) -> None:
    x = sample(150)
    compressor = QSGD(4, 64, norm)
    _, scales = compressor.compress(x, ctx_of(x))
    norms = [float(b.norm() if norm == "l2" else b.abs().max()) for b in x.split(64)]
    assert [s * 7 for s in scales.tolist()] == pytest.approx(norms, rel=1e-6)


def rounding_variance(compressor: QSGD, x: torch.Tensor) -> float:
    """E |C(x) - x|^2, exactly: each element is one level up with probability f, its fraction."""
    _, scales = compressor.compress(x, ctx_of(x))
    scale = scales.double().repeat_interleave(compressor.bucket_size)[: x.numel()]
    fraction = torch.where(scale > 0, x.double().abs() / scale, 0).frac()
    return float((scale.square() * fraction * (1 - fraction)).sum())


BUCKETS = {
    "gaussian": sample(512),
    "heavy": sample(512) ** 5,
    "constant": torch.full((512,), 0.7),
    "one": torch.eye(512)[3],
    # the worst there is for the largest magnitude as the norm: all but one at a fraction of a level
    "spike": torch.full((512,), 0.03).index_fill(0, torch.tensor([5]), 1.0),
}


@pytest.mark.parametrize("kind", BUCKETS)
@pytest.mark.parametrize("norm", ["l2", "max"])
@pytest.mark.parametrize(("bits", "levels"), [(2, None), (4, 3), (4, None), (8, None), (8, 23)])
def test_variance_bound(bits, levels, norm, kind: str) -> None:
    """Lemma 3.1: E |C(x) - x|^2 <= min(d/s^2, sqrt(d)/s) |x|^2 with the 2-norm."""
    compressor, x = QSGD(bits, 512, norm, levels), BUCKETS[kind]
    s = compressor.s
    if norm == "l2":
        assert compressor.variance_bound == pytest.approx(min(512 / s**2, 512**0.5 / s))
    assert rounding_variance(compressor, x) <= compressor.variance_bound * float(
        x.double().square().sum()
    ) * (1 + 1e-6)  # scales are rounded to float32


def test_the_bound_for_the_largest_magnitude_is_reached() -> None:
    """One element at the norm, the others where they add most: no smaller bound would do."""
    compressor = QSGD(4, 512, "max")
    shares = [0.001 * i for i in range(1, 143)]
    spikes = [
        BUCKETS["spike"].clone().clamp(max=t).index_fill(0, torch.tensor([5]), 1.0) for t in shares
    ]
    for share, spike in zip(shares, spikes, strict=True):
        spike[spike < 1] = share
    worst = max(rounding_variance(compressor, x) / float(x.square().sum()) for x in spikes)
    assert 0.999 * compressor.variance_bound < worst <= compressor.variance_bound * (1 + 1e-6)


def test_drawn_variance_is_what_the_formula_says() -> None:
    x, draws = sample(512), 400
    errors = torch.stack(
        [(transmit(QSGD(), x, salt=i) - x).double().square().sum() for i in range(draws)]
    )
    # 5 standard deviations of the mean
    assert abs(errors.mean() - rounding_variance(QSGD(), x)) < 5 * errors.std() / draws**0.5


def test_whole_levels_are_never_rounded() -> None:
    x = torch.arange(-127.0, 128.0)
    for salt in range(50):
        assert torch.equal(transmit(QSGD(8, 256, "max"), x, salt=salt), x)


@pytest.mark.parametrize("size", [1e-45, 1e-40])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_buckets_without_a_normal_scale_are_zeros(bits, size: float) -> None:
    """Its reciprocal would be inf; a bucket beside it is not affected."""
    x = torch.cat([torch.full((64,), size), torch.full((64,), 0.5)])
    sent = transmit(QSGD(bits, 64, "max"), x)
    assert not sent[:64].any()
    torch.testing.assert_close(sent[64:], x[64:], rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_squares_neither_overflow_nor_vanish(size: float) -> None:
    x = torch.tensor([3.0, 4.0, 0.0, 0.0]) * size
    torch.testing.assert_close(transmit(QSGD(4, 4, levels=5), x), x, rtol=1e-6, atol=0)

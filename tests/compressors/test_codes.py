"""Sign, ternary, random-k, cast and quantised codes: what each one's formula says."""

from __future__ import annotations

import pytest
import torch

from commkit.compressors import BlockQuantize, Cast, NoCompression, RandomK, Sign, Ternary

from .inputs import ctx_of, sample, transmit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize(("scale", "power"), [("l1", 1), ("rms", 2)])
def test_sign_scale(scale, power: int, dtype: torch.dtype) -> None:
    x = sample(4097, dtype=dtype)
    size = float(x.double().abs().pow(power).mean() ** (1 / power))
    expected = torch.where(x >= 0, size, -size).double()
    # the scale travels as float32, the sum of 4097 elements is taken in float32
    torch.testing.assert_close(transmit(Sign(scale), x).double(), expected, rtol=1e-6, atol=0)


def test_l1_is_the_scale_of_least_error() -> None:
    x = sample(1000) ** 3
    best, *others = (
        float((x - transmit(Sign(), x) * factor).norm()) for factor in (1.0, 0.99, 1.01)
    )
    assert best < min(others)


@pytest.mark.parametrize("clip", [0.0, 2.5])
def test_ternary_sends_three_values(clip: float) -> None:
    x = sample(4097) ** 3
    limit = clip * float(x.square().mean().sqrt()) if clip else float(x.abs().max())
    sent = transmit(Ternary(clip), x)
    torch.testing.assert_close(sent.unique(), torch.tensor([-limit, 0.0, limit]), rtol=1e-5, atol=0)
    assert bool((sent * x >= 0).all())


def test_ternary_is_unbiased_up_to_the_clipping() -> None:
    x = sample(200)
    limit = 1.5 * float(x.square().mean().sqrt())
    clipped, draws = x.clamp(-limit, limit), 2000
    mean = sum(transmit(Ternary(1.5), x, salt=i).double() for i in range(draws)) / draws
    # variance |g| (s - |g|) of each draw, 5 standard deviations
    deviation = (clipped.abs() * (limit - clipped.abs())).clamp(min=0).sqrt()
    assert bool(((mean - clipped).abs() <= 5 * deviation / draws**0.5 + 1e-6).all())


def test_a_single_element_survives_every_code() -> None:
    """A spread about the mean would be 0 for it, and the gradient lost for ever."""
    x = torch.tensor([-0.7])
    for compressor in (Ternary(), Ternary(0), Sign(), Sign("rms"), BlockQuantize(4), RandomK()):
        assert transmit(compressor, x).tolist() == pytest.approx([-0.7], rel=1e-6)


@pytest.mark.parametrize("shape", [(100,), (10, 10), ()], ids=str)
def test_randomk_sends_its_elements_as_they_are(shape) -> None:
    x = sample(100).view(shape) if shape else sample(1).view(())
    sent = transmit(RandomK(0.2), x)
    kept = sent != 0
    assert int(kept.sum()) == max(1, x.numel() // 5)
    assert torch.equal(sent[kept], x[kept])


def test_randomk_draws_anew_for_each_step_and_name() -> None:
    x = torch.ones(1000)
    compressor = RandomK(0.05)
    supports = [
        compressor.decompress(compressor.compress(x, ctx), ctx) > 0
        for ctx in (ctx_of(x, "a", 0), ctx_of(x, "a", 1), ctx_of(x, "b", 0), ctx_of(x, "a", 0, 1))
    ]
    for i, first in enumerate(supports):
        for second in supports[i + 1 :]:
            # 2.5 of 50 in common on average
            assert int((first & second).sum()) < 15


def test_randomk_reaches_every_element() -> None:
    x = torch.ones(300)
    reached = sum(transmit(RandomK(0.1), x, step=step) for step in range(150))
    assert bool((reached > 0).all())  # missed by one element in 25 000


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_cast_rounds_once(name, dtype: torch.dtype) -> None:
    x = sample(1000)
    (payload,) = Cast(name).compress(x, ctx_of(x))
    assert payload.dtype == dtype
    assert torch.equal(transmit(Cast(name), x), x.to(dtype).float())


def test_cast_overflow_stays_visible() -> None:
    assert transmit(Cast("fp16"), torch.tensor([1e5])).isinf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_no_compression_is_exact(dtype: torch.dtype) -> None:
    x = sample(1000, dtype=dtype)
    assert torch.equal(transmit(NoCompression(), x), x.to(ctx_of(x).work_dtype))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("bits", [4, 8])
def test_an_outlier_spoils_its_own_block_alone(bits, rounding) -> None:
    x = sample(1024)
    x[0] = 1e6
    error = (transmit(BlockQuantize(bits, 256, rounding), x) - x).abs()
    assert error[:256].max() > 0.3
    assert error[256:].max() <= 4.5 / (2 ** (bits - 1) - 1)

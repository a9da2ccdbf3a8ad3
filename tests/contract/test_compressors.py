"""The laws of every registered compressor."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from commkit import registry
from commkit.types import Compressor

from .compressor_cases import CASES, DTYPES, SHAPES, CompressorCase, ctx_of, sample, transmit

with_magnitudes = pytest.mark.parametrize("case", [c for c in CASES if c.magnitudes], ids=str)
every_compressor = pytest.mark.parametrize("case", CASES, ids=str)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_registered_compressor_has_a_case() -> None:
    assert {case.name for case in CASES} == set(registry.names("compressor"))


@every_compressor
def test_is_frozen_data(case: CompressorCase) -> None:
    compressor = case.build()
    assert isinstance(compressor, Compressor)
    assert dataclasses.is_dataclass(compressor)
    assert compressor == case.build()
    assert hash(compressor) == hash(case.build())
    assert registry.lookup("compressor", case.name) is type(compressor)


@every_compressor
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape_dtype_device_and_declared_bytes(case: CompressorCase, shape) -> None:
    compressor = case.build()
    for dtype in DTYPES:
        x = sample(shape, dtype)
        ctx = ctx_of(x)
        payload = compressor.compress(x, ctx)
        decoded = compressor.decompress(payload, ctx)
        assert decoded.shape == x.shape
        assert decoded.dtype == ctx.work_dtype
        assert decoded.device == x.device
        assert bool(decoded.isfinite().all())
        if compressor.fixed_size:
            counted = sum(t.numel() * t.element_size() for t in payload)
            assert counted == compressor.payload_bytes(ctx)


@with_magnitudes
def test_zeros_decode_to_zeros(case: CompressorCase) -> None:
    for shape in SHAPES:
        for dtype in DTYPES:
            assert not transmit(case.build(), torch.zeros(shape, dtype=dtype)).any()


@every_compressor
@pytest.mark.parametrize("shape", [(40,), (8, 4, 3, 3)], ids=str)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_bad_values_do_not_raise(case: CompressorCase, bad: float, shape) -> None:
    x = sample(shape)
    x.view(-1)[3] = bad
    assert transmit(case.build(), x).shape == x.shape


@every_compressor
def test_same_context_same_bits(case: CompressorCase) -> None:
    x = sample((4097,))
    ctx = ctx_of(x)
    first, again = (case.build().compress(x, ctx, 1) for _ in range(2))
    assert same(first, again)
    assert same([case.build().decompress(first, ctx)], [case.build().decompress(again, ctx)])


@every_compressor
def test_only_stochastic_rounding_depends_on_the_salt(case: CompressorCase) -> None:
    x = sample((4097,))
    payloads = [case.build().compress(x, ctx_of(x), salt) for salt in (0, 1)]
    assert same(*payloads) is not case.salted


@every_compressor
def test_inputs_are_left_alone_and_nothing_is_shared(case: CompressorCase) -> None:
    compressor = case.build()
    x = sample((64, 48))
    ctx, before = ctx_of(x), x.clone()
    payload = compressor.compress(x, ctx)
    sent = [t.clone() for t in payload]
    assert torch.equal(x, before)
    x.zero_()
    assert same(payload, sent), "the payload is a view of the input"
    compressor.decompress(payload, ctx).fill_(7)
    assert same(payload, sent), "the decoded tensor is a view of the payload"


@every_compressor
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "strided"])
def test_memory_layout_does_not_matter(case: CompressorCase, layout: str) -> None:
    """Gradients of channels_last and tied, transposed weights are not contiguous."""
    x = {
        "transposed": sample((48, 64)).t(),
        "channels_last": sample((8, 4, 3, 3)).to(memory_format=torch.channels_last),
        "strided": sample((500,))[::2],
    }[layout]
    assert not x.is_contiguous()
    expected = transmit(case.build(), x.contiguous())
    # float32 sums inside a scale may be taken in another order
    torch.testing.assert_close(transmit(case.build(), x), expected, rtol=1e-6, atol=0)


@every_compressor
def test_torchs_generator_is_not_touched(case: CompressorCase) -> None:
    before = torch.get_rng_state()
    transmit(case.build(), sample((4097,)), salt=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("case", [c for c in CASES if c.averaged], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_combine_is_the_mean_of_what_was_sent(case: CompressorCase, dtype) -> None:
    compressor = case.build()
    xs = [sample((4097,), dtype, seed=s) for s in range(3)]
    ctx = ctx_of(xs[0])
    payloads = [compressor.compress(x, ctx, salt) for salt, x in enumerate(xs)]
    mean = torch.stack([compressor.decompress(p, ctx).double() for p in payloads]).mean(0)
    combined = compressor.combine(payloads, ctx)
    assert combined.shape == ctx.shape
    assert combined.dtype == ctx.work_dtype
    # two float32 additions and a division of values below 100
    torch.testing.assert_close(combined.double(), mean, rtol=1e-6, atol=1e-6)


@every_compressor
def test_combining_one_is_decoding_it(case: CompressorCase) -> None:
    compressor, x = case.build(), sample((4097,))
    payload = compressor.compress(x, ctx_of(x))
    assert torch.equal(
        compressor.combine([payload], ctx_of(x)), compressor.decompress(payload, ctx_of(x))
    )


@pytest.mark.parametrize("case", [c for c in CASES if c.build().wire == "summable"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_of_summable_payloads_decode_to_sums(case: CompressorCase, dtype) -> None:
    compressor = case.build()
    xs = [sample((4097,), dtype, seed=s) for s in range(3)]
    ctx = ctx_of(xs[0])
    payloads = [compressor.compress(x, ctx, salt) for salt, x in enumerate(xs)]
    summed = tuple(sum(parts[1:], parts[0]) for parts in zip(*payloads, strict=True))
    expected = sum(compressor.decompress(p, ctx).double() for p in payloads)
    # two additions in the payload's own precision, of sums of up to four times the largest value
    eps = max(torch.finfo(t.dtype).eps for t in payloads[0])
    decoded = compressor.decompress(summed, ctx).double()
    assert (decoded - expected).abs().max() <= 2 * eps * expected.abs().max()

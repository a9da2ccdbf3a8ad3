"""Many tensors in one call give the bits of one call for each, whatever their sizes and dtypes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from commkit.addends import CompressesSums
from commkit.compressors import BlockQuantize, Sign
from commkit.types import Compressor, TensorCtx

MAKE: dict[str, Callable[[], Compressor]] = {
    "sign l1": Sign,
    "sign rms": lambda: Sign("rms"),
    "int8": lambda: BlockQuantize(bits=8),
}


def contexts(xs: list[Tensor]) -> list[TensorCtx]:
    return [TensorCtx(f"x{i}", x.shape, x.dtype, x.device, 3, 5) for i, x in enumerate(xs)]


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,), (torch.float32, torch.float64, torch.bfloat16)]
)
@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 70), max_size=6), ranks=st.integers(1, 3))
def test_together_is_one_by_one(
    make: Callable[[], Compressor], dtypes: tuple[torch.dtype, ...], sizes: list[int], ranks: int
) -> None:
    compressor = make()
    generator = torch.Generator().manual_seed(sum(sizes) + ranks)
    of_ranks = [
        [
            torch.randn(n, generator=generator).to(dtypes[i % len(dtypes)])
            for i, n in enumerate(sizes)
        ]
        for _ in range(ranks)
    ]
    ctxs = contexts(of_ranks[0])
    together = [compressor.compress_each(xs, ctxs, rank) for rank, xs in enumerate(of_ranks)]
    alone = [
        [compressor.compress(x, ctx, rank) for x, ctx in zip(xs, ctxs, strict=True)]
        for rank, xs in enumerate(of_ranks)
    ]
    for made, wanted in zip(together, alone, strict=True):
        for payload, other in zip(made, wanted, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(payload, other, strict=True))

    outs = [torch.empty(ctx.numel, dtype=ctx.work_dtype) for ctx in ctxs]
    by_tensor = [tuple(rows[i] for rows in together) for i in range(len(sizes))]
    compressor.combine_each_into(outs, by_tensor, ctxs)
    for out, payloads, ctx in zip(outs, by_tensor, ctxs, strict=True):
        wanted_out = torch.empty_like(out)
        compressor.combine_into(wanted_out, payloads, ctx)
        assert torch.equal(out, wanted_out)

    kept = [x.to(ctx.work_dtype, copy=True) for x, ctx in zip(of_ranks[0], ctxs, strict=True)]
    one_by_one = [x.clone() for x in kept]
    compressor.subtract_each_(kept, together[0], ctxs)
    for x, y, payload, ctx in zip(kept, one_by_one, together[0], ctxs, strict=True):
        compressor.subtract_(y, payload, ctx)
        assert torch.equal(x, y)


@pytest.mark.parametrize("make", [Sign, lambda: Sign("rms")], ids=["l1", "rms"])
@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 70), min_size=1, max_size=6), peers=st.integers(1, 3))
def test_sums_are_added_and_compressed(
    make: Callable[[], Sign], sizes: list[int], peers: int
) -> None:
    """Less what was sent, where that is known: with gradients, and with the means of what was received."""
    compressor = make()
    assert isinstance(compressor, CompressesSums)
    generator = torch.Generator().manual_seed(sum(sizes))
    dtypes = torch.float32, torch.bfloat16
    gradients = [torch.randn(n, generator=generator).to(dtypes[i % 2]) for i, n in enumerate(sizes)]
    ctxs = contexts(gradients)
    residuals = [torch.randn(n, generator=generator) for n in sizes]
    sent = [None if i % 3 == 2 else torch.tensor([0.1 * i]) for i in range(len(sizes))]
    left = [
        e if m is None else e - torch.where(e >= 0, m, -m)
        for e, m in zip(residuals, sent, strict=True)
    ]
    received = [
        [compressor.compress(torch.randn(n, generator=generator), ctx) for _ in range(peers)]
        for n, ctx in zip(sizes, ctxs, strict=True)
    ]
    means = [compressor.combine(row, ctx) for row, ctx in zip(received, ctxs, strict=True)]
    for others in (gradients, means):
        sums = [torch.empty_like(e) for e in residuals]
        if others is gradients:
            made = compressor.compress_sums(sums, residuals, sent, gradients, ctxs)
        else:
            made = compressor.compress_means(sums, residuals, sent, received, ctxs)
        wanted = [e + x for e, x in zip(left, others, strict=True)]
        for total, payload, x, ctx in zip(sums, made, wanted, ctxs, strict=True):
            assert torch.equal(total, x)
            for a, b in zip(payload, compressor.compress(x, ctx), strict=True):
                assert torch.equal(a, b)


def test_zeros_are_nothing_and_l1_can_be_taken_later() -> None:
    x, zeros = torch.tensor([3.0, -1.0]), torch.zeros(2)
    (ctx,) = contexts([x])
    rows = [[Sign().compress(v, ctx) for v in pair] for pair in ((zeros, zeros), (zeros, x))]
    assert Sign().nothing_sent(rows) == [True, False]
    (mean, none) = (c.mean_sent(c.compress(x, ctx)) for c in (Sign(), Sign("rms")))
    assert mean is not None
    assert float(mean) == 2
    assert none is None

"""What compressors make of payloads that no compressor wrote: a result of the right shape or an error, nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from commkit.types import Compressor, Payload, TensorCtx

from .compressor_cases import CASES, CompressorCase, ctx_of, sample

SHAPES = ((7,), (64, 48), (4097,))
REFUSALS = (IndexError, ValueError, RuntimeError)

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def random_bytes(payload: Payload, seed: int) -> Payload:
    """Of the same dtypes and shapes."""
    generator = torch.Generator().manual_seed(seed)

    def noise(x: Tensor) -> Tensor:
        size = x.numel() * x.element_size()
        made = torch.randint(0, 256, (size,), generator=generator).to(torch.uint8)
        return made.view(x.dtype).view(x.shape)

    return tuple(noise(x) for x in payload)


def decoders(compressor: Compressor, ctx: TensorCtx, good: Payload, bad: Payload):
    """Everything that reads what a peer sent."""
    out = torch.zeros(ctx.numel, dtype=ctx.work_dtype)
    yield lambda: compressor.decompress(bad, ctx)
    yield lambda: compressor.combine([good, bad], ctx)
    yield lambda: compressor.combine_into(out, [bad, good], ctx)
    yield lambda: compressor.combine_each_into([out], [[good, bad]], [ctx])
    yield lambda: compressor.subtract_(out, bad, ctx)


@every_shape
@every_case
def test_random_bytes_are_decoded_or_refused(case: CompressorCase, shape: tuple[int, ...]) -> None:
    x, compressor = sample(shape), case.build()
    ctx = ctx_of(x)
    good = compressor.compress(x, ctx)
    for seed in range(4):
        for decode in decoders(compressor, ctx, good, random_bytes(good, seed)):
            try:
                result = decode()
            except REFUSALS:
                continue
            assert result is None or (result.shape == shape and result.dtype == ctx.work_dtype)


def other_lengths(x: Tensor) -> list[Tensor]:
    """Of no element, of half of them, and of one too few and one too many."""
    flat = x.reshape(-1)
    lengths = {0, flat.numel() // 2, flat.numel() - 1} - {flat.numel()}
    return [flat[:n].clone() for n in sorted(lengths)] + [torch.cat([flat, flat[:1]])]


@every_shape
@every_case
def test_payloads_of_another_length_are_refused(
    case: CompressorCase, shape: tuple[int, ...]
) -> None:
    x, compressor = sample(shape), case.build()
    ctx = ctx_of(x)
    good = compressor.compress(x, ctx)
    for part, whole in enumerate(good):
        for wrong in other_lengths(whole):
            bad = (*good[:part], wrong, *good[part + 1 :])
            for decode in decoders(compressor, ctx, good, bad):
                with pytest.raises(REFUSALS):
                    decode()

"""Compression of sums, which are formed on the way where the compressor can."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..types import CompressesSums, Compressor, Payload, TensorCtx


def compress_sums(
    compressor: Compressor,
    sums: Sequence[Tensor],
    addends: Sequence[tuple[Tensor, Tensor] | None],
    ctxs: Sequence[TensorCtx],
    salt: int,
) -> list[Payload]:
    """``compressor.compress_each`` of ``sums``; where there are ``addends``, their sum is written there first, for
    which the compressor has to be a :class:`CompressesSums`."""
    whole = [i for i, pair in enumerate(addends) if pair is None]
    pairs = [(i, pair) for i, pair in enumerate(addends) if pair is not None]
    made = compressor.compress_each([sums[i] for i in whole], [ctxs[i] for i in whole], salt)
    payloads = dict(zip(whole, made, strict=True))
    if pairs:
        assert isinstance(compressor, CompressesSums)
        own = [i for i, _ in pairs]
        made = compressor.compress_sums(
            [sums[i] for i in own],
            [residual for _, (residual, _) in pairs],
            [gradient for _, (_, gradient) in pairs],
            [ctxs[i] for i in own],
            salt,
        )
        payloads |= zip(own, made, strict=True)
    return [payloads[i] for i in range(len(sums))]

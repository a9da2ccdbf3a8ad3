"""Compression of sums, which are formed on the way where the compressor can."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..addends import AddendsPart, compresses_sums
from ..types import Compressor, Payload, TensorCtx


def compress_sums(
    compressor: Compressor,
    sums: Sequence[Tensor],
    addends: Sequence[AddendsPart | None],
    ctxs: Sequence[TensorCtx],
    salt: int,
) -> list[Payload]:
    """``compressor.compress_each`` of ``sums``; where there are ``addends``, their sum is written there first, for
    which the compressor has to be a :class:`CompressesSums`."""
    whole = [i for i, part in enumerate(addends) if part is None]
    parts = [(i, part) for i, part in enumerate(addends) if part is not None]
    made = compressor.compress_each([sums[i] for i in whole], [ctxs[i] for i in whole], salt)
    payloads = dict(zip(whole, made, strict=True))
    if parts:
        assert compresses_sums(compressor)
        own = [i for i, _ in parts]
        made = compressor.compress_sums(
            [sums[i] for i in own],
            [part.residual for _, part in parts],
            [part.sent for _, part in parts],
            [part.gradient for _, part in parts],
            [ctxs[i] for i in own],
            salt,
        )
        payloads |= zip(own, made, strict=True)
    return [payloads[i] for i in range(len(sums))]

"""One message as bytes: a header of fixed size, and one body with all tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Message

HEADER = 6  # 64-bit integers: magic, kind, sequence, version, number of tensors, bytes of the body
HEADER_BYTES = 8 * HEADER
_MAGIC = 0x636F6D6D6B697401
_ALIGN = 16  # of each tensor in the body, so that it can be viewed in its dtype
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def encode(message: Message) -> tuple[Tensor, Tensor]:
    """``message`` as (header, body): int64 and uint8, both 1-D, on the CPU, sharing no memory with it.

    Raises:
        TypeError: a tensor of a dtype that has no place in the format.
    """
    shapes: list[int] = []
    for x in message.tensors:
        if x.dtype not in _DTYPES:
            raise TypeError(f"a tensor of {x.dtype} cannot be sent; send it as bytes")
        shapes += [_DTYPES.index(x.dtype), x.dim(), *x.shape]
    sizes = [x.numel() * x.element_size() for x in message.tensors]
    front = torch.tensor([len(shapes), *shapes], dtype=torch.int64).view(torch.uint8)
    starts = _starts(front.numel(), sizes)
    body = torch.zeros(starts[-1] if message.tensors else 0, dtype=torch.uint8)
    if message.tensors:
        body[: front.numel()] = front
    for x, start, size in zip(message.tensors, starts, sizes, strict=False):
        place = body[start : start + size].view(x.dtype).view(x.shape)
        place.copy_(x.detach())
    header = [
        _MAGIC,
        message.kind,
        message.sequence,
        message.version,
        len(message.tensors),
        body.numel(),
    ]
    return torch.tensor(header, dtype=torch.int64), body


def body_bytes(header: Tensor) -> int:
    """How many bytes follow ``header``.

    Raises:
        ValueError: it is none of ours.
    """
    magic, *_, size = header.tolist()
    if magic != _MAGIC or size < 0:
        raise ValueError("what arrived is no message of this library; give all ranks its version")
    return int(size)


def decode(header: Tensor, body: Tensor) -> Message:
    """The message of :func:`encode`; its tensors are views of ``body``."""
    _, kind, sequence, version, count, _ = header.tolist()
    tensors: list[Tensor] = []
    if count:
        length = int(body[:8].view(torch.int64))
        shapes = iter(body[8 : 8 * (length + 1)].view(torch.int64).tolist())
        kinds = [
            (_DTYPES[code], [next(shapes) for _ in range(next(shapes))])
            for code in shapes
            # next() takes the rank and the sizes that follow each code
        ]
        sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in kinds]
        starts = _starts(8 * (length + 1), sizes)
        tensors = [
            body[start : start + size].view(dtype).view(shape)
            for start, size, (dtype, shape) in zip(starts, sizes, kinds, strict=False)
        ]
    return Message(kind, sequence, version, tuple(tensors))


def _starts(first: int, sizes: Sequence[int]) -> list[int]:
    """Where each tensor begins, and where the body ends."""
    starts = [_aligned(first)]
    for size in sizes:
        starts.append(_aligned(starts[-1] + size))
    return starts


def _aligned(place: int) -> int:
    return -(-place // _ALIGN) * _ALIGN

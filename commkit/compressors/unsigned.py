"""Unsigned codes of 2, 4 or 8 bits, several in a byte."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_unsigned(codes: Tensor, bits: int) -> Tensor:
    """(n,) uint8 below 2^bits -> (ceil(n bits / 8),) uint8, the first code in the lowest bits."""
    per_byte = 8 // bits
    if per_byte == 1:
        return codes
    parts = pad(codes, (0, -codes.numel() % per_byte)).view(-1, per_byte)
    packed = parts[:, 0].clone()
    for place in range(1, per_byte):
        packed |= parts[:, place] << (place * bits)
    return packed


def unpack_unsigned(packed: Tensor, numel: int, bits: int) -> Tensor:
    """Inverse of :func:`pack_unsigned`: (numel,) uint8.

    Raises:
        ValueError: ``packed`` is of another size.
    """
    per_byte = 8 // bits
    check_size("codes", packed, -(-numel // per_byte))
    if per_byte == 1:
        return packed
    top = (1 << bits) - 1
    parts = [(packed >> (place * bits)) & top for place in range(per_byte)]
    return torch.stack(parts, dim=1).view(-1)[:numel]


def check_size(name: str, x: Tensor, *shape: int) -> None:
    """What a peer sent may be anything.

    Raises:
        ValueError: ``x`` is of another shape.
    """
    if x.shape != shape:
        raise ValueError(f"{name} of a payload has shape {tuple(x.shape)} and must have {shape}")


def check_buckets(bits: int, bucket_size: int) -> None:
    """
    Raises:
        ValueError: bits or bucket size out of range.
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"bits={bits} must be 2, 4 or 8; use one of them")
    if bucket_size < 4 or bucket_size % 4:
        raise ValueError(f"bucket_size={bucket_size} must be a multiple of 4; use for example 1024")


def buckets(x: Tensor, size: int) -> Tensor:
    """(n,) -> (ceil(n / size), size). The last one is filled up with its own last element, which leaves its range
    alone."""
    missing = -x.numel() % size
    if missing:
        x = torch.cat([x, x[-1:].expand(missing)])
    return x.view(-1, size)

"""All tensors of a model as one message."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

WireDtype: TypeAlias = Literal["fp32", "bf16"]


def check_wire_dtype(wire_dtype: str) -> None:
    """
    Raises:
        ValueError: it is not a :data:`WireDtype`.
    """
    if wire_dtype not in ("fp32", "bf16"):
        raise ValueError(f"wire_dtype={wire_dtype!r} must be 'fp32' or 'bf16'")


def full(x: Tensor) -> Tensor:
    """A copy of ``x`` in full precision."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)


def flat(values: Mapping[str, Tensor]) -> Tensor:
    """(P,): the tensors back to back, in order, copied, in the widest of their dtypes."""
    widest = functools.reduce(torch.promote_types, (x.dtype for x in values.values()))
    return torch.cat([x.detach().reshape(-1).to(widest) for x in values.values()])


def parts(x: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: views of ``x``, shaped and named as ``like``."""
    pieces = x.split_with_sizes([y.numel() for y in like.values()])
    return {
        name: piece.view(y.shape) for (name, y), piece in zip(like.items(), pieces, strict=True)
    }


def for_wire(x: Tensor, wire_dtype: WireDtype) -> Tensor:
    """What is sent of ``x``: itself, or rounded to bf16. Float64 stays with "fp32", which rounds nothing."""
    return x.to(torch.bfloat16) if wire_dtype == "bf16" else x

"""What an in-place operator must be given, whichever kernel serves it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_sign_rows(out: Tensor, bits: Sequence[Tensor], scales: Tensor) -> None:
    _check_out(out)
    _check_rows("bits", bits, -(-out.numel() // 8), torch.uint8)
    _check("scales", scales, len(bits), out.dtype)


def check_block_rows(
    out: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: int,
    block_size: int,
    divisor: int,
) -> None:
    _check_out(out)
    if bits not in (4, 8):
        raise ValueError(f"bits={bits} must be 4 or 8")
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1")
    if not 1 <= divisor < 2**24:  # beyond, float32 does not have every whole number
        raise ValueError(f"divisor={divisor} must be at least 1 and below 2^24")
    n = out.numel()
    _check_rows("codes", codes, n if bits == 8 else -(-n // 2), torch.uint8)
    _check_rows("scales", scales, -(-n // block_size), torch.float32)
    if len(codes) != len(scales):
        raise ValueError(f"scales has {len(scales)} tensors for {len(codes)} of codes")


def _check_out(out: Tensor) -> None:
    if not out.is_floating_point():
        raise TypeError(f"out is of {out.dtype} and must be of a floating dtype")
    if out.dim() != 1:
        raise ValueError(f"out has shape {tuple(out.shape)} and must be 1-D; pass out.view(-1)")


def _check_rows(name: str, rows: Sequence[Tensor], numel: int, dtype: torch.dtype) -> None:
    if not rows:
        raise ValueError(f"{name} is empty and must have at least one tensor")
    for place, row in enumerate(rows):
        _check(f"{name}[{place}]", row, numel, dtype)


def _check(name: str, x: Tensor, numel: int, dtype: torch.dtype) -> None:
    if x.dtype != dtype:
        raise TypeError(f"{name} is of {x.dtype} and must be of {dtype}")
    if x.dim() != 1 or x.numel() != numel:
        raise ValueError(f"{name} has shape {tuple(x.shape)} and must have ({numel},)")

"""Compiled kernels that choose elements, and add chosen ones up."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import reference
from .binding import DTYPES, call, empty, fits, flat, is_scalar, kernel, run
from .selection import groups_around, sample_of


@kernel()
def sample_threshold(x: Tensor, k: int, seed: int) -> Tensor:
    """float32, bfloat16, float16."""
    n = x.numel()
    if not (flat(x) and 1 <= k <= n):
        return reference.sample_threshold(x, k, seed)
    first, stride, rank = sample_of(n, k, seed)
    found = torch.empty((), device=x.device)
    if run("ck_ranked_magnitude", x, DTYPES[x.dtype], n, first, stride, rank, found):
        raise MemoryError("no memory for the sample of sample_threshold")
    return found


@kernel()
def select_at_least(x: Tensor, threshold: Tensor) -> Tensor:
    """float32, bfloat16, float16; a threshold of float32."""
    if not (flat(x) and is_scalar(threshold, x.device)):
        return reference.select_at_least(x, threshold)
    found, limit = ctypes.c_void_p(), float(threshold)
    place = ctypes.byref(found)
    count = run("ck_select_at_least", x, DTYPES[x.dtype], x.numel(), limit, place)
    if count < 0:
        raise MemoryError("no memory for the indices of select_at_least")
    indices = empty((count,), torch.int64, x.device)
    call("ck_take", found, indices)
    return indices


@kernel()
def largest(x: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """float32, bfloat16, float16."""
    n = x.numel()
    if not (flat(x) and 1 <= k <= n):
        return reference.largest(x, k, seed)
    places, values = empty((k,), torch.int64, x.device), empty((k,), torch.float32, x.device)
    *sample, rank, _ = groups_around(n, k, seed)
    if run("ck_largest", x, DTYPES[x.dtype], n, *sample, rank, k, places, values):
        raise MemoryError("no memory for the candidates of largest")
    return places, values


@kernel("CPU", "CUDA")
def largest_of_rows(x: Tensor, k: int) -> Tensor:
    """float32, bfloat16, float16."""
    rows, n = x.shape
    if not (x.is_contiguous() and flat(x.view(-1)) and rows and 1 <= k <= n):
        return reference.largest_of_rows(x, k)
    indices = empty((rows, k), torch.int64, x.device)
    if run("ck_largest_of_rows", x, DTYPES[x.dtype], rows, n, k, indices):
        raise MemoryError("no memory for the candidates of largest_of_rows")
    return indices


@kernel()
def scatter_accumulate_(out: Tensor, indices: Tensor, values: Tensor) -> None:
    """float32, indices of int32 or int64."""
    n, k = out.numel(), indices.numel()
    if not (
        flat(out, torch.float32)
        and flat(indices, torch.int32, torch.int64)
        and indices.device == out.device
        and fits(values, k, torch.float32, out.device)
    ):
        reference.scatter_accumulate_(out, indices, values)
    elif call("ck_scatter_accumulate", out, n, indices, indices.element_size(), values, k):
        raise IndexError(f"indices has one outside of out, which has {n} elements")

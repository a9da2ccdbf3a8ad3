"""Compiled CUDA kernels whose arguments are not those of the CPU's: they need memory for what is between two
launches, and results stay on the GPU. The others are bound with the CPU's."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .binding import DTYPES, empty, fits, flat, is_scalar, kernel, run, workspace
from .native_selection import largest_of_rows
from .native_updates import correct_momentum_, serves_correction
from .selection import largest_from, ranks_around, sample_of


def _ranked(x: Tensor, first: int, stride: int, rank: int) -> Tensor:
    found = empty((), torch.float32, x.device)
    counts = workspace(x.device, "ck_cuda_ranked_magnitude_workspace")
    run("ck_ranked_magnitude", x, DTYPES[x.dtype], x.numel(), first, stride, rank, found, counts)
    return found


@kernel("CUDA")
def sample_threshold(x: Tensor, k: int, seed: int) -> Tensor:
    """float32, bfloat16, float16."""
    n = x.numel()
    if not (flat(x) and 1 <= k <= n):
        return reference.sample_threshold(x, k, seed)
    return _ranked(x, *sample_of(n, k, seed))


def _take(marks: Tensor, n: int) -> Tensor:
    """Waits for the GPU: for the size of the result."""
    indices = empty((int(marks[:8].view(torch.int64)),), torch.int64, marks.device)
    if indices.numel():
        run("ck_take", marks, n, indices)
    return indices


@kernel("CUDA")
def select_at_least(x: Tensor, threshold: Tensor) -> Tensor:
    """float32, bfloat16, float16; a threshold of float32. Waits for the GPU."""
    if not (flat(x) and is_scalar(threshold, x.device)):
        return reference.select_at_least(x, threshold)
    n = x.numel()
    marks = workspace(x.device, "ck_cuda_select_workspace", n)
    run("ck_select_at_least", x, DTYPES[x.dtype], n, threshold, marks)
    return _take(marks, n)


@kernel("CUDA")
def largest(x: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """float32, bfloat16, float16. Waits for the GPU."""
    n = x.numel()
    if not (flat(x) and 1 <= k <= n):
        return reference.largest(x, k, seed)
    first, stride, rank, _ = ranks_around(n, k, seed)
    threshold = _ranked(x, first, stride, rank)
    found = select_at_least(x, threshold)
    places = largest_from(x, k, threshold, found, select_at_least, largest_of_rows)
    return places, x.index_select(0, places).float()


@kernel("CUDA")
def dgc_step_(
    u: Tensor,
    v: Tensor,
    g: Tensor,
    velocity: Tensor | None,
    unsent: Tensor | None,
    momentum: float,
    nesterov: bool,
    masking: bool,
    negligible: float,
    k: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """float32, bfloat16, float16. Waits for the GPU."""
    n = g.numel()
    if not (serves_correction(u, v, g, velocity, unsent) and 1 <= k <= n):
        return reference.dgc_step_(
            *(u, v, g, velocity, unsent, momentum, nesterov, masking, negligible, k, seed)
        )
    first, stride, rank, _ = ranks_around(n, k, seed)
    part, *before = (
        None if x is None else x[first::stride].contiguous() for x in (g, velocity, unsent)
    )
    assert part is not None
    own_u, own_v = (empty(part.shape, torch.float32, g.device) for _ in range(2))
    correct_momentum_(own_u, own_v, part, *before, momentum, nesterov)
    threshold = _ranked(own_v, 0, 1, rank)
    marks = workspace(g.device, "ck_cuda_select_workspace", n)
    how = velocity, unsent, momentum, nesterov
    run("ck_correct_and_select", g, DTYPES[g.dtype], n, *how, threshold, u, v, marks)
    places = largest_from(v, k, threshold, _take(marks, n), select_at_least, largest_of_rows)
    values = v.index_select(0, places)
    v.index_fill_(0, places, 0)
    if masking:
        kept = values.abs() <= negligible
        u.index_copy_(0, places, torch.where(kept, u.index_select(0, places), 0))
    return places, values


@kernel("CUDA")
def scatter_accumulate_(out: Tensor, indices: Tensor, values: Tensor) -> None:
    """float32, indices of int32 or int64. An index outside is found by the GPU, and is an error of its, as it
    is with torch's own indexing."""
    k = indices.numel()
    if (
        flat(out, torch.float32)
        and flat(indices, torch.int32, torch.int64)
        and indices.device == out.device
        and fits(values, k, torch.float32, out.device)
    ):
        size = indices.element_size()
        run("ck_scatter_accumulate", out, out.numel(), indices, size, values, k)
    else:
        reference.scatter_accumulate_(out, indices, values)

"""Pure-torch kernels that choose elements, and add chosen ones up."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .noise import uniform_noise

# Of floats of so many bytes: integers as wide, and the one that follows infinity.
_BITS = {4: (torch.int32, 0x7F800001), 8: (torch.int64, 0x7FF0000000000001)}


def sample_of(n: int, k: int, seed: int) -> tuple[int, int, int]:
    """(first, stride, rank): the rank-th largest of ``x[first::stride]`` estimates the k-th largest of the n
    elements of x.

    About 0.1 % of them, but at least 64 of the wanted ones, or all of x. The stride is odd and a multiple of
    32 plus 1, its start random (Lin et al. 2018, section 3.1, who take 0.1 to 1 %, and its public code).
    """
    wanted = min(n, max(n // 1000, -(-64 * n // k)))
    stride = max(1, n // wanted)
    if stride > 32:
        stride = stride // 32 * 32 + 1
    first = seed % stride
    size = (n - first + stride - 1) // stride
    return first, stride, max(1, min(size, round(k * size / n)))


def ranks_around(n: int, k: int, seed: int) -> tuple[int, int, int, int]:
    """(first, stride, low, high) of the same sample: its low-th largest is hardly ever above the k-th largest
    of all, and its high-th hardly ever below. 0: there is no such one."""
    first, stride, rank = sample_of(n, k, seed)
    return first, stride, *_around(rank, (n - first + stride - 1) // stride)


_GROUP = 4


def groups_around(n: int, k: int, seed: int) -> tuple[int, int, int, int, int]:
    """(first, stride, group, low, high): as :func:`ranks_around`, of a sample as large that has ``group``
    neighbours from each place: on a CPU what they cost is the line of the cache."""
    _, stride, _ = sample_of(n, k, seed)
    group = _GROUP if stride > _GROUP else 1
    stride *= group
    first = seed % min(stride, n)
    groups = (n - first + stride - 1) // stride
    size = groups * group - max(0, first + (groups - 1) * stride + group - n)
    rank = max(1, min(size, round(k * size / n)))
    return first, stride, group, *_around(rank, size)


# Standard deviations of a rank. Too few candidates cost another pass or two, too many masked a few writes.
_BELOW, _ABOVE = 3, 2


def _around(rank: int, size: int) -> tuple[int, int]:
    deviation = math.sqrt(rank)
    low, high = (math.ceil(times * deviation) for times in (_BELOW, _ABOVE))
    return min(size, rank + low), max(0, rank - high)


_LOWER, _TRIES = 0.8, 10


def largest_from(
    x: Tensor,
    k: int,
    threshold: Tensor,
    found: Tensor,
    select: Callable[[Tensor, Tensor], Tensor],
    largest: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """(k,) int64, increasing: the k largest of x, as ``largest`` chooses them of a row. ``found`` is what
    ``select`` finds at ``threshold``; while it is less than k, the threshold is lowered."""
    for _ in range(_TRIES):
        if found.numel() >= k:
            best = largest(x.index_select(0, found).unsqueeze(0), k)[0]
            return found.index_select(0, best)
        threshold = threshold * _LOWER
        found = select(x, threshold)
    return largest(x.unsqueeze(0), k)[0]


def sample_threshold(x: Tensor, k: int, seed: int) -> Tensor:
    """A 0-d estimate of the k-th largest ``|x|`` from the strided sample of :func:`sample_of`."""
    first, stride, rank = sample_of(x.numel(), k, seed)
    sample = x[first::stride].abs()
    return torch.topk(sample, rank, sorted=True).values[-1].to(torch.float32, copy=True)


def select_at_least(x: Tensor, threshold: Tensor) -> Tensor:
    """int64, increasing: where ``|x|`` is not below ``threshold``. NaN never is, so it is always found."""
    return (~(x.abs() < threshold)).nonzero().view(-1)


def _order(x: Tensor) -> Tensor:
    """Integers that order as ``|x|`` does, NaN above all: the bits of a float without its sign. Every NaN
    is one."""
    work = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    kind, nan = _BITS[work.element_size()]
    return (work.view(kind) & torch.iinfo(kind).max).clamp_(max=nan)


def largest_of_rows(x: Tensor, k: int) -> Tensor:
    """(rows, k) int64, increasing in each row: where the k largest ``|x|`` of each row of ``x``, (rows, n),
    are. Of equal ones the first are taken; NaN is above all."""
    order = _order(x)
    if k == 0 or not order.numel():
        return torch.empty((x.shape[0], k), dtype=torch.int64, device=x.device)
    least = torch.topk(order, k, dim=1).values[:, -1:]
    above, equal = order > least, order == least
    wanted = k - above.sum(dim=1, keepdim=True)
    found = above | (equal & (equal.cumsum(dim=1) <= wanted))
    return found.nonzero()[:, 1].clone().view(-1, k)


def largest(x: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Where the k largest ``|x|`` are, as :func:`largest_of_rows` finds them, and the elements there in the
    work dtype. ``seed`` is of the sample that says which elements are worth sorting, and changes nothing of
    the result."""
    if k == 0:
        places = torch.empty(0, dtype=torch.int64, device=x.device)
    else:
        # The sample holds at least 64 of the k: two standard deviations more, and the first try nearly always
        # finds enough.
        margin = 2 / math.sqrt(max(64, k // 1000))
        threshold = sample_threshold(x, min(x.numel(), math.ceil(k * (1 + margin))), seed)
        found = select_at_least(x, threshold)
        places = largest_from(x, k, threshold, found, select_at_least, largest_of_rows)
    values = x.index_select(0, places)
    return places, values.to(torch.promote_types(x.dtype, torch.float32))


def stratified_indices(numel: int, k: int, seed: int, device: torch.device) -> Tensor:
    """(k,) int64, one uniform index from each of k consecutive strata of nearly equal length."""
    bounds = torch.arange(k + 1, dtype=torch.int64, device=device) * numel // max(k, 1)
    # 48 hash bits, so that the modulo bias stays below size / 2^48.
    high = uniform_noise(k, seed, device).double()
    low = uniform_noise(k, seed ^ 0x5BD1E995, device).double()
    u = high + low * 2.0**-24
    sizes = bounds[1:] - bounds[:-1]
    return bounds[:-1] + torch.minimum((u * sizes).long(), sizes - 1)


def scatter_accumulate_(out: Tensor, indices: Tensor, values: Tensor) -> None:
    """``out[indices] += values`` in place. Indices are unique, so that the result is deterministic."""
    if values.shape != indices.shape:
        raise ValueError(
            f"values has shape {tuple(values.shape)} and must have {tuple(indices.shape)}, as indices"
        )
    positions = indices.long()
    out.index_copy_(0, positions, out.index_select(0, positions) + values.to(out.dtype))

"""A step of DGC in one pass against its parts, where the sample that guides it misleads it too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from commkit import ops
from commkit.ops import reference
from commkit.ops.selection import groups_around

from .native_levels import levels, needs_native, running
from .test_native import assert_same, corrected, finite, stepped

pytestmark = needs_native

N, K, SEED = 40_000, 400, 11
HALVES = (torch.bfloat16, torch.float16)


def sampled(n: int = N) -> torch.Tensor:
    """Whether an element is in the sample."""
    first, stride, group, *_ = groups_around(n, K, SEED)
    assert stride > group
    inside = torch.zeros(n, dtype=torch.bool)
    for place in range(group):
        inside[first + place :: stride] = True
    return inside


def few(count: int) -> torch.Tensor:
    """Zeros but for so many."""
    x = torch.zeros(N)
    x[torch.arange(count) * (N // max(count, 1)) + 3] = finite(count).abs() + 1
    return x


def with_bad(count: int) -> torch.Tensor:
    x = finite(N)
    x[7 : 7 + 5 * count : 5] = torch.nan
    x[8 : 8 + 5 * count : 5] = -torch.inf
    return x


# What v becomes, but for a rounding.
TOTALS: dict[str, Callable[[], torch.Tensor]] = {
    "as sampled": lambda: finite(N),
    "the sample is too large by little": lambda: finite(N) * torch.where(sampled(), 1.5, 1.0),
    "the sample is too large by far": lambda: finite(N) * torch.where(sampled(), 1e6, 1.0),
    "the sample is too small by little": lambda: finite(N) * torch.where(sampled(), 0.7, 1.0),
    "the sample is too small by far": lambda: finite(N) * torch.where(sampled(), 1e-6, 1.0),
    "the sample is 0": lambda: finite(N) * torch.where(sampled(), 0.0, 1.0),
    "zeros": lambda: torch.zeros(N),
    "fewer than k": lambda: few(K - 1),
    "k and zeros": lambda: few(K),
    "more than k and zeros": lambda: few(K + 1),
    "all equal": lambda: torch.full((N,), -0.5),
    "few magnitudes": lambda: finite(N).round(),
    "denormal": lambda: finite(N) * 1e-41,
    "a few that are not finite": lambda: with_bad(20),
    "many that are not finite": lambda: with_bad(3000),
    "only NaN": lambda: torch.full((N,), torch.nan),
}


def moved(total: torch.Tensor) -> torch.Tensor:
    """What u becomes: seven numbers of about the size of what is not 0."""
    size = total.abs()[(total != 0) & total.isfinite()].amin() if total.nan_to_num().any() else 1.0
    return torch.arange(float(N)).remainder_(7) * size


def step(
    module: Any, total: torch.Tensor, masking: bool = True, negligible: float = 0
) -> tuple[torch.Tensor, ...]:
    u, v, becomes = torch.empty(N), torch.empty(N), moved(total)
    before = becomes * 2, total - becomes
    found = module.dgc_step_(
        u, v, torch.zeros(N), *before, 0.5, False, masking, negligible, K, SEED
    )
    return u, v, *found


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("name", TOTALS)
def test_whatever_the_sample_says(name: str, level: str) -> None:
    total = TOTALS[name]()
    for masking in (False, True):
        wanted = step(reference, total, masking)
        assert wanted[2].numel() == K
        with running(level):
            assert_same(step(ops, total, masking), wanted)


@pytest.mark.parametrize("name", TOTALS)
def test_on_any_number_of_threads(name: str) -> None:
    special, n = TOTALS[name](), (1 << 20) + N  # enough for seven
    rest = finite(n - N)
    for unsent in (torch.cat([rest, special]), torch.cat([special, rest])):
        g, velocity = finite(n), finite(n).flip(0)
        results = []
        for module, threads in ((reference, 1), (ops, 1), (ops, 2), (ops, 7)):
            u, v = torch.empty(n), torch.empty(n)
            with running("", threads):
                found = module.dgc_step_(u, v, g, velocity, unsent, 0.5, True, True, 0, n // 50, 3)
            results.append((u, v, *found))
        for got in results[1:]:
            assert_same(got, results[0])


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("n", [1 << 18, (1 << 21) + 1029])
def test_past_the_caches(n: int, at: int, dtype: torch.dtype, level: str) -> None:
    """Large results are stored differently, where their memory allows it."""
    for call in (
        corrected(n, dtype, (True, True), False, at),
        stepped(n, dtype, 0.01, at=at),
        stepped(n, dtype, 0.001, (True, False), True, at=at),
    ):
        wanted = call(reference)
        for threads in (1, 2):
            with running(level, threads):
                assert_same(call(ops), wanted)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_velocity_of_which_nothing_is_sent_stays(dtype: torch.dtype) -> None:
    """Half precision has no number for the smallest magnitudes."""
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    total = smallest * torch.tensor([0.25, 0.5, 0.75, 1.0]).repeat(N // 4)
    total[K:] = 0
    u, v, places, values = step(ops, total, True, smallest / 2)
    gone = values.to(dtype) == 0
    assert int(gone.sum()) == K // 2
    assert torch.equal(u[places][gone], moved(total)[places][gone])
    assert not u[places][~gone].any()
    assert not v.any()
    assert_same((u, v, places, values), step(reference, total, True, smallest / 2))


def test_nothing_is_written_outside() -> None:
    n = (1 << 18) + 1029
    for at in (16, 17):
        memory = torch.full((2, n + 64), 5.0)
        u, v = (row[at : at + n] for row in memory)
        ops.dgc_step_(u, v, finite(n), finite(n), finite(n), 0.9, False, True, 0.0, n // 100, 1)
        assert bool((memory[:, :at] == 5).all())
        assert bool((memory[:, at + n :] == 5).all())
        assert not bool((memory[:, at : at + n] == 5).any())

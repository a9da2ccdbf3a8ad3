"""Who serves what: every element once, by a function of name, size and world size alone."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commkit.aggregators.sharding import Shard, shards_of
from commkit.types import TensorCtx

sizes = st.integers(0, 3000) | st.sampled_from([4096, 4097, 50_000, 1_000_003])
worlds = st.integers(1, 5)
granules = st.sampled_from([8, 24, 64, 4096])


def shards(numel: int, world_size: int, granule: int, key: str = "w", step: int = 0) -> list[Shard]:
    ctx = TensorCtx(key, torch.Size([numel]), torch.float32, torch.device("cpu"), step, 0)
    return shards_of(3, ctx, world_size, granule)


@settings(max_examples=300, deadline=None)
@given(sizes, worlds, granules)
def test_every_element_has_one_owner(numel: int, world_size: int, granule: int) -> None:
    cut = shards(numel, world_size, granule)
    assert [s.start for s in cut] == [0, *(s.end for s in cut)][: len(cut)]
    assert sum(s.numel for s in cut) == numel
    assert all(s.numel > 0 for s in cut)
    assert all(s.index == 3 and s.ctx.numel == s.numel for s in cut)


@settings(max_examples=300, deadline=None)
@given(sizes, worlds, granules)
def test_load_is_even(numel: int, world_size: int, granule: int) -> None:
    cut = shards(numel, world_size, granule)
    owners = [s.owner for s in cut]
    assert len(set(owners)) == len(owners) <= world_size
    assert all(0 <= owner < world_size for owner in owners)
    # aligned, and no longer than an even share rounded up to whole granules
    assert all(s.start % granule == 0 for s in cut)
    share = -(-numel // world_size)
    assert all(s.numel <= -(-share // granule) * granule for s in cut)


def test_names_of_shards_are_unique_and_stable() -> None:
    cut = shards(10_000, 4, 64)
    assert len({s.ctx.key for s in cut}) == len(cut)
    later = shards(10_000, 4, 64, step=9)
    assert [(s.ctx.key, s.owner) for s in cut] == [(s.ctx.key, s.owner) for s in later]


def test_small_tensors_are_spread_over_the_ranks() -> None:
    owners = [shards(10, 4, 4096, key=f"layer.{i}.bias")[0].owner for i in range(200)]
    counts = [owners.count(rank) for rank in range(4)]
    assert min(counts) > 25  # 50 each on average, 4 standard deviations below

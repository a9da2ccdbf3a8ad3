"""Reductions overlap with backward, in one order on all ranks, whatever the ranks' timing."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import commkit
from tests.adapters import problem
from tests.harness import run_ranks


def _overlaps(rank: int, world_size: int) -> bool:
    """Backward of the first layer waits until a later layer's bucket is reduced: only a reduction that
    runs beside backward can end that wait."""
    net = DDP(problem.model(), bucket_cap_mb=0.02)
    handle = commkit.attach(net, "powersgd")
    problem.train(net, range(3), rank)  # past the rebuild: several buckets, last layer first
    reduced = threading.Event()
    inner = handle.reducer.reduce

    def reduce(*args: Any) -> dict[str, Tensor]:
        result = inner(*args)
        reduced.set()
        return result

    handle.reducer.reduce = reduce  # type: ignore[method-assign]
    overlapped = []
    net.module[0].weight.register_hook(lambda grad: overlapped.append(reduced.wait(20.0)))
    problem.loss_of(net, 3, rank).backward()
    handle.close()
    return overlapped == [True]


def test_reductions_run_beside_backward() -> None:
    assert run_ranks(_overlaps, 2) == [True, True]


def _deep() -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    net = nn.Sequential(
        *(nn.Linear(problem.WIDTH, problem.WIDTH) for _ in range(15)), nn.Linear(64, 8)
    )
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 8)
    return net


def _with_jitter(rank: int, world_size: int, scheme: str, bucket_cap_mb: float) -> list[Any]:
    net = DDP(_deep(), bucket_cap_mb=bucket_cap_mb)
    handle = commkit.attach(net, scheme)
    waits, inner, buckets = random.Random(rank), handle.reducer.reduce, []

    def reduce(*args: Any) -> dict[str, Tensor]:
        time.sleep(waits.random() * 2e-3)
        buckets.append(list(args[0]))
        return inner(*args)

    handle.reducer.reduce = reduce  # type: ignore[method-assign]
    problem.train(net, range(40), rank, lr=0.01)
    handle.close()
    return [len(buckets) / 40, problem.replicas_equal(net), problem.parameters(net)]


def test_many_buckets_with_two_collectives_each_equal_one_bucket() -> None:
    """The bug class of hooks that chain collectives in Future callbacks: hangs and wrong sums."""
    for scheme in ("powersgd", "sign"):
        many = run_ranks(_with_jitter, 2, scheme, 0.01)[0]
        one = run_ranks(_with_jitter, 2, scheme, 1000.0)[0]
        assert many[0] > 12
        assert one[0] == 1
        assert many[1]
        assert torch.equal(many[2], one[2])  # two ranks: sums commute exactly

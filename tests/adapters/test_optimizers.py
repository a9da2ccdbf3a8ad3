"""Optimizers that communicate, on real models: DDP, ZeRO-1, accumulation, loss scales, plain modules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP

import commkit
from commkit.optim import DGCSGD, CommOptimizer, DeMo, OneBitAdam, OneBitLamb, ZeroOneAdam
from tests.adapters import problem
from tests.harness import run_ranks

STEPS = 14
MAKE: dict[str, Callable[..., CommOptimizer]] = {
    "onebit_adam": lambda ps: OneBitAdam(ps, 1e-2, freeze_step=4, min_numel=100),
    "clipped": lambda ps: OneBitAdam(
        ps, 1e-2, freeze_step=4, min_numel=100, max_grad_norm=0.1, clip="gradient"
    ),
    "onebit_lamb": lambda ps: OneBitLamb(ps, 1e-2, freeze_step=4, min_numel=100),
    "zero_one_adam": lambda ps: ZeroOneAdam(
        ps, 1e-2, var_freeze_step=6, local_step_scaler=4, local_step_clipper=2
    ),
}


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int,
    steps: range = range(STEPS),
    micro_batches: int = 1,
    scaler: Any = None,
) -> None:
    for step in steps:
        optimizer.zero_grad()
        for micro in range(micro_batches):
            last = micro == micro_batches - 1
            waits = isinstance(net, DDP) and not last
            with net.no_sync() if waits else contextlib.nullcontext():
                loss = problem.loss_of(net, 100 * micro + step, rank) / micro_batches
                (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()


def _layouts(rank: int, world_size: int, name: str) -> bool:
    """All ways to cut buckets, and no DDP at all, give the same bits."""
    results = []
    for options in (
        {},
        {"bucket_cap_mb": 0.02},
        {"bucket_cap_mb": 0.02, "gradient_as_bucket_view": True},
        {"bucket_cap_mb": 0.02, "find_unused_parameters": True},
    ):
        net = DDP(problem.model(), **options)
        optimizer = MAKE[name](net.parameters())
        handle = commkit.attach(net, optimizer)
        train(net, optimizer, rank)
        handle.close()
        results.append(problem.parameters(net))
    plain = problem.model()
    optimizer = MAKE[name](plain.parameters())
    handle = commkit.attach(plain, optimizer)
    train(plain, optimizer, rank)
    handle.close()
    results.append(problem.parameters(plain))
    assert problem.replicas_equal(net)
    return all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("name", MAKE)
def test_buckets_and_wrappers_do_not_change_the_result(name: str) -> None:
    assert all(run_ranks(_layouts, 2, name))


def _accumulated(rank: int, world_size: int, name: str) -> tuple[bool, int]:
    """Micro-batches accumulate under no_sync and are sent once, as on a plain module."""
    results, rounds = [], []
    for wrapped in (True, False):
        net: nn.Module = problem.model()
        net = DDP(net) if wrapped else net
        optimizer = MAKE[name](net.parameters())
        handle = commkit.attach(net, optimizer)
        train(net, optimizer, rank, micro_batches=3)
        rounds.append(handle.last_step.rounds)
        handle.close()
        results.append(problem.parameters(net))
    return torch.equal(*results), rounds[0]


def test_micro_batches_are_sent_once() -> None:
    for same, rounds in run_ranks(_accumulated, 2, "onebit_adam"):
        assert same
        assert 0 < rounds <= 4


class Branches(nn.Module):
    """One branch for each rank, one for all, and one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = problem.model(0)
        self.own = nn.ModuleList([problem.model(1), problem.model(2)])
        self.idle = problem.model(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.shared(x) + self.own[torch.distributed.get_rank()](x)
        return y


def _unused(rank: int, world_size: int, name: str) -> tuple[bool, bool, bool]:
    net = DDP(Branches(), find_unused_parameters=True, bucket_cap_mb=0.02)
    before = problem.parameters(net.module.idle)
    optimizer = MAKE[name](net.parameters())
    handle = commkit.attach(net, optimizer)
    train(net, optimizer, rank, range(20))
    equal = problem.replicas_equal(net)
    still = torch.equal(before, problem.parameters(net.module.idle))
    # The branch of the other rank moves too: its gradient reaches this one.
    other = net.module.own[1 - rank]
    moved = not torch.equal(problem.parameters(other), problem.parameters(problem.model(2 - rank)))
    handle.close()
    return equal, still, moved


@pytest.mark.parametrize("name", ["onebit_adam", "onebit_lamb", "zero_one_adam"])
def test_unused_parameters(name: str) -> None:
    assert run_ranks(_unused, 2, name) == [(True, True, True)] * 2


ZERO: dict[str, tuple[type[CommOptimizer], dict[str, Any]]] = {
    "onebit_adam": (
        OneBitAdam,
        {"lr": 1e-2, "freeze_step": 4, "min_numel": 100, "weight_decay": 0.01},
    ),
    "dgc": (DGCSGD, {"lr": 0.05, "density": 0.1, "min_numel": 100, "weight_decay": 0.01}),
    "demo": (DeMo, {"lr": 1e-3, "top_k": 64, "min_numel": 100, "weight_decay": 0.01}),
}


def _zero(rank: int, world_size: int, name: str) -> tuple[bool, int, int]:
    """Optimizer state sharded by ZeRO-1 gives the bits of the whole optimizer."""
    make, settings = ZERO[name]
    whole = DDP(problem.model(), bucket_cap_mb=0.02)
    optimizer: Any = make(whole.parameters(), **settings)
    handle = commkit.attach(whole, optimizer)
    train(whole, optimizer, rank)
    handle.close()
    sharded = DDP(problem.model(), bucket_cap_mb=0.02)
    zero = ZeroRedundancyOptimizer(sharded.parameters(), make, **settings)
    handle = commkit.attach(sharded, zero)
    train(sharded, zero, rank)
    handle.close()
    owned = sum(len(group["params"]) for group in zero.optim.param_groups)
    same = torch.equal(problem.parameters(whole), problem.parameters(sharded))
    return same, owned, len(list(sharded.parameters()))


@pytest.mark.parametrize("name", ZERO)
def test_zero_redundancy_optimizer(name: str) -> None:
    told = run_ranks(_zero, 2, name)
    assert all(same for same, _, _ in told)
    assert sum(owned for _, owned, _ in told) == told[0][2]  # each has a part of the state only


def _not_for_zero(rank: int, world_size: int) -> str:
    net = DDP(problem.model())
    settings = {"lr": 0.05, "density": 0.1, "start_step": 2}
    try:
        commkit.attach(net, ZeroRedundancyOptimizer(net.parameters(), DGCSGD, **settings))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "accepted"


def test_what_only_the_owner_knows_cannot_be_handed_over() -> None:
    assert all("must hold all" in text for text in run_ranks(_not_for_zero, 2))


def _scaled(rank: int, world_size: int, growth: int) -> tuple[bool, float]:
    """A power of two as the loss scale, growing on the way, does not change a bit."""
    results = []
    scale = 1.0
    for scaled in (False, True):
        net = DDP(problem.model())
        optimizer = MAKE["onebit_adam"](net.parameters())
        scaler = (
            torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=growth)
            if scaled
            else None
        )
        handle = commkit.attach(net, optimizer, grad_scaler=scaler)
        train(net, optimizer, rank, scaler=scaler)
        handle.close()
        results.append(problem.parameters(net))
        scale = scaler.get_scale() if scaler else scale
    return torch.equal(*results), scale


def test_a_loss_scale_changes_nothing() -> None:
    for same, scale in run_ranks(_scaled, 2, 5):
        assert same
        assert scale > 1024


def _refusals(rank: int, world_size: int) -> list[str]:
    said = []

    def refused(attach: Callable[[], Any]) -> None:
        try:
            attach()
        except (RuntimeError, TypeError, ValueError) as error:
            said.append(str(error))
        else:
            said.append("accepted")

    net = DDP(problem.model())
    refused(lambda: commkit.attach(net.module, MAKE["onebit_adam"](net.parameters())))
    refused(lambda: commkit.attach(net, MAKE["onebit_adam"](net.parameters()).step))  # no scheme
    refused(lambda: commkit.attach(net, torch.optim.SGD(net.parameters(), 0.1)))
    refused(lambda: commkit.attach(net, "onebit_adam"))
    refused(lambda: commkit.attach(problem.model(), "powersgd"))
    few = list(net.parameters())[:2]
    refused(lambda: commkit.attach(net, MAKE["onebit_adam"](few)))
    refused(lambda: commkit.attach(net, MAKE["zero_one_adam"](few)))
    more = [*net.parameters(), nn.Parameter(torch.zeros(3))]
    refused(lambda: commkit.attach(net, MAKE["onebit_adam"](more)))
    plain = problem.model()
    optimizer = MAKE["onebit_adam"](plain.parameters())
    refused(lambda: commkit.attach(plain, optimizer, grad_scaler=torch.amp.GradScaler("cpu")))
    return said


def test_what_cannot_work_is_refused_with_a_remedy() -> None:
    for said in run_ranks(_refusals, 2):
        expected = [
            "all-reduces its gradients already; attach to the DDP module",
            "",
            "which does not communicate",
            "is an optimizer; build it and attach that",
            "wrap the model in torch.nn.parallel.DistributedDataParallel first",
            "is in no rank's optimizer; add it, or freeze it",
            "must hold all; add it, or freeze it",
            "is in the optimizer but not in the model",
            "GradScaler skips the step on the rank that overflowed",
        ]
        for text, part in zip(said, expected, strict=True):
            assert text != "accepted"
            assert part in text


def _closure(rank: int, world_size: int) -> str:
    plain = problem.model()
    optimizer = MAKE["onebit_adam"](plain.parameters())
    commkit.attach(plain, optimizer)
    with pytest.raises(RuntimeError, match="step\\(\\) without a closure") as caught:
        optimizer.step(lambda: 0.0)
    return str(caught.value)


def test_a_closure_is_refused_where_the_step_reduces() -> None:
    run_ranks(_closure, 2)


def _plain_sgd(rank: int, world_size: int, scheme: str) -> tuple[bool, bool]:
    """Any scheme works on a plain module with any optimizer, with the bits of DDP."""
    wrapped = DDP(problem.model())
    handle: Any = commkit.attach(wrapped, scheme)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.05, momentum=0.9)
    train(wrapped, optimizer, rank)
    handle.close()
    plain = problem.model()
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9)
    handle = commkit.attach(plain, scheme, optimizer)
    train(plain, optimizer, rank)
    stats = handle.last_step
    handle.close()
    same = torch.equal(problem.parameters(wrapped), problem.parameters(plain))
    return same, stats.wire_bytes > 0 and stats.num_contributors == world_size


@pytest.mark.parametrize("scheme", ["ddp", "powersgd", "topk"])
def test_plain_modules(scheme: str) -> None:
    assert run_ranks(_plain_sgd, 2, scheme) == [(True, True)] * 2

"""DDP trained through commkit: equality with DDP itself, and every option in which buckets differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import commkit
from commkit.optim import OptimizerScheme
from tests.adapters import problem
from tests.harness import run_ranks
from tests.named_schemes import OPTIMIZERS, REDUCERS

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "one_bucket": {"bucket_cap_mb": 1000},
    "many_buckets": {"bucket_cap_mb": 0.02},
    "bucket_view": {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.02},
    "unused": {"find_unused_parameters": True, "bucket_cap_mb": 0.02},
    "static": {"static_graph": True, "bucket_cap_mb": 0.02},
}


def _matches_ddp(rank: int, world_size: int, options: dict[str, Any]) -> tuple[bool, bool]:
    plain = DDP(problem.model(), **options)
    problem.train(plain, range(12), rank)
    attached = DDP(problem.model(), **options)
    handle = commkit.attach(attached, "ddp")
    problem.train(attached, range(12), rank)
    handle.close()
    return (
        torch.equal(problem.parameters(plain), problem.parameters(attached)),
        problem.replicas_equal(attached),
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_ddp_scheme_is_bitwise_ddp(options: dict[str, Any]) -> None:
    assert run_ranks(_matches_ddp, 2, options) == [(True, True)] * 2


def _all_layouts(rank: int, world_size: int, scheme: str) -> list[torch.Tensor]:
    results = []
    for options in OPTIONS.values():
        net = DDP(problem.model(), **options)
        handle = commkit.attach(net, scheme)
        problem.train(net, range(8), rank)
        handle.close()
        assert problem.replicas_equal(net)
        results.append(problem.parameters(net))
    return results


@pytest.mark.parametrize("scheme", ["powersgd", "sign", "topk", "int8"])
def test_buckets_do_not_change_the_result(scheme: str) -> None:
    """State, randomness and shards are keyed by parameter; with two ranks sums commute exactly."""
    first, *others = run_ranks(_all_layouts, 2, scheme)[0]
    for other, name in zip(others, list(OPTIONS)[1:], strict=True):
        assert torch.equal(first, other), name


def _every_scheme(rank: int, world_size: int) -> dict[str, tuple[bool, float, float]]:
    outcomes = {}
    for scheme in [*REDUCERS, *OPTIMIZERS, "hierarchical"]:
        block: dict[str, Any] = {"name": scheme}
        if scheme == "hierarchical":
            block |= {"scheme": "powersgd", "local_size": 1}
        net = DDP(problem.model(), bucket_cap_mb=0.02)
        made, optimizer = commkit.schemes.make_scheme(block), None
        if isinstance(made, OptimizerScheme):
            optimizer = made(net.parameters(), lr={"sgd": 0.05, "adamw": 0.003}[made.like])
        handle = commkit.attach(net, optimizer or made)
        if scheme == "signsgd_vote":  # results are +1 and -1, whatever the gradient
            optimizer = torch.optim.SGD(net.parameters(), 2e-3)
        losses = problem.train(net, range(40), rank, optimizer=optimizer)
        handle.close()
        outcomes[scheme] = (problem.replicas_equal(net), losses[0], sum(losses[-5:]) / 5)
    return outcomes


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_scheme_trains_and_keeps_replicas_equal(world_size: int) -> None:
    for scheme, (equal, first, last) in run_ranks(_every_scheme, world_size)[0].items():
        assert equal or (scheme == "noop" and world_size > 1), scheme
        assert last < 0.8 * first, scheme


def _accumulate(rank: int, world_size: int, scheme: str) -> tuple[torch.Tensor, int]:
    net = DDP(problem.model(), bucket_cap_mb=0.02)
    handle = commkit.attach(net, scheme)
    for step in range(4):
        with net.no_sync():
            for micro in range(2):
                problem.loss_of(net, 3 * step + micro, rank).backward()
        problem.loss_of(net, 3 * step + 2, rank).backward()
    steps = handle.reducer.step
    handle.close()
    return torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.grad is not None]), steps


def test_accumulation_reduces_once_per_synchronised_backward() -> None:
    def expected(rank: int) -> torch.Tensor:
        net = problem.model()
        for step in range(12):
            problem.loss_of(net, step, rank).backward()
        return torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.grad is not None])

    results = run_ranks(_accumulate, 2, "ddp")
    assert [steps for _, steps in results] == [4, 4]
    mean = (expected(0) + expected(1)) / 2
    # Sums over 12 micro-steps in another order: float32 rounding only.
    torch.testing.assert_close(results[0][0], mean, rtol=1e-4, atol=1e-5)
    assert run_ranks(_accumulate, 2, "powersgd")[0][1] == 4


class _Routed(nn.Module):
    """Uses one of two branches; the other's parameters get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([problem.model(1), problem.model(2)])

    def forward(self, x: torch.Tensor, which: int) -> torch.Tensor:
        return self.branches[which](x)


def _conserves_when_unused(rank: int, world_size: int) -> list[float]:
    """Branch 0 always on rank 0, on rank 1 every other step; branch 1 unused everywhere at times."""
    net = DDP(_Routed().double(), find_unused_parameters=True, bucket_cap_mb=0.02)
    handle = commkit.attach(net, "sign", min_numel=0)
    put_in = {n: torch.zeros_like(p) for n, p in net.module.named_parameters()}
    got_out = {n: torch.zeros_like(t) for n, t in put_in.items()}
    for step in range(10):
        which = 0 if rank == 0 or step % 2 == 0 else 1
        x, y = (t.double() for t in problem.batch(step, rank))
        own = _Routed().double()
        nn.functional.mse_loss(own(x, which), y).backward()
        for name, p in own.named_parameters():
            if p.grad is not None:
                put_in[name] += p.grad
        net.zero_grad(set_to_none=True)
        nn.functional.mse_loss(net(x, which), y).backward()
        for name, p in net.module.named_parameters():
            if p.grad is not None:
                got_out[name] += p.grad
    state = handle.state_dict()
    handle.close()
    worst = 0.0
    for name, total in put_in.items():
        residual = state.get(f"rank/{name}", torch.zeros_like(total))
        server = torch.zeros(total.numel(), dtype=torch.float64)
        for key, value in state.items():
            if key.startswith(f"aggregator/shard/{name}@"):
                start = int(key.rpartition("@")[2])
                server[start : start + value.numel()] = value
        both = torch.stack([(total - residual) / world_size, -server.view_as(total)]).sum(0)
        torch.distributed.all_reduce(both)
        scale = total.abs().max().clamp_min(1e-3)
        worst = max(worst, float(((both - got_out[name]).abs() / scale).max()))
    return [worst]


def test_unused_parameters_lose_nothing() -> None:
    """Sum of results + residuals == sum of gradients, though DDP drops results of unused parameters."""
    worst = max(w for result in run_ranks(_conserves_when_unused, 2) for w in result)
    assert worst < 1e-12  # sums of ten float64 steps


def _odd_parameters(rank: int, world_size: int, scheme: str) -> bool:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = problem.model()
            self.scale = nn.Parameter(torch.ones(()))
            self.empty = nn.Parameter(torch.empty(0, 4))
            self.frozen = nn.Parameter(torch.ones(64, 64), requires_grad=False)
            self.tied = nn.Linear(8, 8, bias=False)
            self.tied_again = nn.Linear(8, 8, bias=False)
            self.tied_again.weight = self.tied.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.tied_again(self.tied(self.body(x @ self.frozen / 64)))
            return y * self.scale + self.empty.sum()

    torch.manual_seed(0)
    net = DDP(Odd(), bucket_cap_mb=0.02)
    handle = commkit.attach(net, scheme)
    losses = problem.train(net, range(10), rank)
    handle.close()
    return problem.replicas_equal(net) and all(loss == loss for loss in losses)


@pytest.mark.parametrize("scheme", ["ddp", "powersgd", "sign", "topk"])
def test_scalar_empty_frozen_and_tied_parameters(scheme: str) -> None:
    assert run_ranks(_odd_parameters, 2, scheme) == [True, True]


def _dtypes(rank: int, world_size: int) -> list[bool]:
    good = []
    for scheme in ("ddp", "bf16", "powersgd", "sign"):
        net = DDP(problem.model().bfloat16(), bucket_cap_mb=0.02)
        handle = commkit.attach(net, scheme)
        x, y = problem.batch(0, rank)
        for _ in range(3):
            nn.functional.mse_loss(net(x.bfloat16()), y.bfloat16()).backward()
        handle.close()
        grads = [p.grad for p in net.parameters()]
        good.append(all(g is not None and g.dtype == torch.bfloat16 for g in grads))
    net = DDP(problem.model(), bucket_cap_mb=0.02)
    handle = commkit.attach(net, "powersgd")
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    for step in range(12):
        x, y = problem.batch(step, rank)
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.mse_loss(net(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    handle.close()
    return [*good, problem.replicas_equal(net), scaler.get_scale() > 2.0**10]


def test_bf16_parameters_autocast_and_gradient_scaler() -> None:
    assert all(run_ranks(_dtypes, 2)[0])


def _groups(rank: int, world_size: int) -> bool:
    """Two replicas groups of two ranks, each with its own model and scheme, at the same time."""
    groups = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2, 3])]
    mine = groups[rank // 2]
    net = DDP(problem.model(rank // 2), process_group=mine, bucket_cap_mb=0.02)
    handle = commkit.attach(net, "powersgd" if rank < 2 else "sign")
    losses = problem.train(net, range(30), rank)
    handle.close()
    return problem.replicas_equal(net, mine) and losses[-1] < losses[0]


def test_several_process_groups_at_once() -> None:
    assert run_ranks(_groups, 4) == [True] * 4

"""Optimizers that communicate in real training: DDP, plain modules, accumulation, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import commkit
from commkit import checkpoint
from commkit.optim import DGCSGD, CommOptimizer, DeMo
from tests.adapters import problem
from tests.harness import run_ranks

LAYOUTS: dict[str, dict[str, Any] | None] = {
    "plain": None,  # not wrapped: reduced at the step
    "default": {},
    "many_buckets": {"bucket_cap_mb": 0.02},
    "bucket_view": {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.02},
    "unused": {"find_unused_parameters": True, "bucket_cap_mb": 0.02},
    "static": {"static_graph": True, "bucket_cap_mb": 0.02},
}
KINDS = ("dgc", "clipped", "demo")


def optimizer_for(kind: str, net: nn.Module) -> CommOptimizer:
    if kind == "demo":
        return DeMo(net.parameters(), lr=0.003, weight_decay=0.01, top_k=8, chunk=32, min_numel=0)
    clip_norm = 0.5 if kind == "clipped" else 0.0
    return DGCSGD(
        net.parameters(),
        lr=0.03,
        weight_decay=1e-3,
        density=0.05,
        min_numel=0,
        start_step=2,
        clip_norm=clip_norm,
    )


def setting(
    kind: str, layout: str = "many_buckets", net: nn.Module | None = None
) -> tuple[nn.Module, CommOptimizer, Any]:
    options, net = LAYOUTS[layout], problem.model() if net is None else net
    wrapped = net if options is None else DDP(net, **options)
    optimizer = optimizer_for(kind, net)
    return wrapped, optimizer, commkit.attach(wrapped, optimizer)


def _all_layouts(rank: int, world_size: int, kind: str) -> list[torch.Tensor]:
    results = []
    for layout in LAYOUTS:
        net, optimizer, handle = setting(kind, layout)
        losses = problem.train(net, range(30), rank, optimizer=optimizer)
        assert losses[-1] < 0.8 * losses[0], (layout, losses)
        assert handle.last_step.wire_bytes > 0
        handle.close()
        assert problem.replicas_equal(net)
        results.append(problem.parameters(net))
    return results


@pytest.mark.parametrize("kind", KINDS)
def test_wrapping_and_buckets_do_not_change_the_result(kind: str) -> None:
    """Also where the norm of the whole gradient is needed, which is there with the last bucket only. With
    two ranks sums commute exactly."""
    first, *others = run_ranks(_all_layouts, 2, kind)[0]
    for other, name in zip(others, list(LAYOUTS)[1:], strict=True):
        assert torch.equal(first, other), name


def _accumulate(rank: int, world_size: int, kind: str, layout: str) -> tuple[torch.Tensor, int]:
    net, optimizer, handle = setting(kind, layout)
    for step in range(6):
        optimizer.zero_grad()
        for micro in range(3):
            if layout == "plain" or micro == 2:
                problem.loss_of(net, 3 * step + micro, rank).backward()
            else:
                with net.no_sync():  # type: ignore[operator]
                    problem.loss_of(net, 3 * step + micro, rank).backward()
        optimizer.step()
    steps = handle.reducer.step
    handle.close()
    assert problem.replicas_equal(net)
    return problem.parameters(net), steps


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_are_reduced_once(kind: str) -> None:
    """DDP adds up micro-batches in its buckets, a plain module in p.grad: the same sums."""
    plain, wrapped = (
        run_ranks(_accumulate, 2, kind, layout)[0] for layout in ("plain", "many_buckets")
    )
    assert plain[1] == wrapped[1] == 6
    assert torch.equal(plain[0], wrapped[0])


class Routed(nn.Module):
    """Uses one of two branches; the other's parameters get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([problem.model(1), problem.model(2)])

    def forward(self, x: torch.Tensor, which: int) -> torch.Tensor:
        result: torch.Tensor = self.branches[which](x)
        return result


def _routed(rank: int, world_size: int, kind: str, layout: str) -> torch.Tensor:
    """Branch 0 always on rank 0, on rank 1 every other step; branch 1 unused everywhere at times."""
    net, optimizer, handle = setting(kind, layout, Routed())
    for step in range(12):
        x, y = problem.batch(step, rank)
        optimizer.zero_grad(set_to_none=True)
        which = 0 if rank == 0 or step % 2 == 0 else 1
        nn.functional.mse_loss(net(x, which), y).backward()
        optimizer.step()
    handle.close()
    assert problem.replicas_equal(net)
    return problem.parameters(net)


@pytest.mark.parametrize("kind", KINDS)
def test_unused_parameters_are_reduced_like_zeros(kind: str) -> None:
    """DDP drops results of parameters that no rank used; their momentum goes on all the same."""
    plain, ddp = (run_ranks(_routed, 2, kind, layout)[0] for layout in ("plain", "unused"))
    assert torch.equal(plain, ddp)


def _clipped_by_hand(rank: int, world_size: int) -> bool:
    net, optimizer, handle = setting("dgc", "unused", Routed())
    for step in range(6):
        x, y = problem.batch(step, rank)
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        nn.functional.mse_loss(net(x, rank if step else 0), y).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.01)
        optimizer.step()
    handle.close()
    return problem.replicas_equal(net)


def test_changes_of_gradients_count_on_ranks_that_did_not_use_a_parameter() -> None:
    """What DDP delivers there is applied, as on the ranks that did."""
    assert run_ranks(_clipped_by_hand, 2) == [True, True]


def _bad_step(rank: int, world_size: int, kind: str, layout: str) -> list[bool]:
    net, optimizer, handle = setting(kind, layout)
    problem.train(net, range(4), rank, optimizer=optimizer)

    def everything() -> list[torch.Tensor]:
        shared = [x for state in optimizer.state.values() for x in state.values()]
        own = [x for k, x in handle.state_dict().items() if k != "shared/step"]
        return [x.detach().clone() for x in (*net.parameters(), *shared, *own)]

    before = everything()
    loss = problem.loss_of(net, 4, rank)
    optimizer.zero_grad()
    (loss * torch.nan if rank == 1 else loss).backward()
    optimizer.step()
    after = everything()
    nothing = len(before) == len(after) and all(map(torch.equal, before, after))
    seen = handle.last_step.nonfinite
    losses = problem.train(net, range(5, 8), rank, optimizer=optimizer)
    handle.close()
    good = all(loss == loss for loss in losses)
    return [nothing, seen, good, problem.replicas_equal(net)]


@pytest.mark.parametrize("layout", ["plain", "many_buckets"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_step_changes_nothing_on_any_rank(kind: str, layout: str) -> None:
    assert run_ranks(_bad_step, 2, kind, layout) == [[True] * 4] * 2


def _scaled(rank: int, world_size: int, kind: str) -> list[bool]:
    """Momenta are in units of unscaled gradients, whatever the scaler does to its scale."""
    results = []
    for scaled in (False, True):
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10, growth_interval=3)
        net = DDP(problem.model(), bucket_cap_mb=0.02)
        optimizer = optimizer_for(kind, net.module)
        handle = commkit.attach(net, optimizer, grad_scaler=scaler)
        for step in range(9):
            optimizer.zero_grad()
            scaler.scale(problem.loss_of(net, step, rank)).backward()
            scaler.step(optimizer)
            scaler.update()
        handle.close()
        results.append(problem.parameters(net))
        grown = not scaled or scaler.get_scale() > 2.0**10
    return [torch.equal(*results), grown, problem.replicas_equal(net)]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_scales_change_nothing(kind: str) -> None:
    """Scales are powers of two, so all is exact."""
    assert run_ranks(_scaled, 2, kind) == [[True] * 3] * 2


def _run(
    rank: int, kind: str, layout: str, directory: Path, steps: range, save_at: int | None
) -> torch.Tensor:
    net, optimizer, handle = setting(kind, layout)
    contents: dict[str, Any] = {
        "replicated": {"model": getattr(net, "module", net), "optimizer": optimizer},
        "per_rank": {},
        "reducer": handle.reducer,
        "comm": handle.comm,
    }
    if steps.start:
        checkpoint.load(directory, **contents)
    for step in steps:
        optimizer.zero_grad()
        problem.loss_of(net, step, rank).backward()
        optimizer.step()
        if save_at == step + 1:
            checkpoint.save(directory, **contents)
    handle.close()
    return problem.parameters(net)


def _resumes(rank: int, world_size: int, kind: str, layout: str, path: str) -> bool:
    directory = Path(path) / "step_6"
    whole = _run(rank, kind, layout, directory, range(12), save_at=6)
    resumed = _run(rank, kind, layout, directory, range(6, 12), save_at=None)
    return torch.equal(whole, resumed)


@pytest.mark.parametrize("layout", ["plain", "many_buckets"])
@pytest.mark.parametrize("kind", ["dgc", "demo"])
def test_a_run_resumed_from_a_checkpoint_is_the_same_run(
    kind: str, layout: str, tmp_path: Path
) -> None:
    assert run_ranks(_resumes, 2, kind, layout, str(tmp_path)) == [True] * 2


def _kept(handle: Any) -> dict[str, torch.Tensor]:
    """Everything that ranks keep, on average."""
    total = {}
    for key, value in sorted(handle.state_dict().items()):
        if key.startswith("rank/"):
            total[key] = handle.comm.all_reduce(value.double() / handle.comm.world_size)
    return total


def _resized(
    rank: int, world_size: int, kind: str, path: str, start: int
) -> list[dict[str, torch.Tensor]]:
    net, optimizer, handle = setting(kind, "many_buckets")
    contents: dict[str, Any] = {
        "replicated": {"model": net.module, "optimizer": optimizer},
        "per_rank": {},
        "reducer": handle.reducer,
        "comm": handle.comm,
    }
    if start:
        checkpoint.load(f"{path}/{start}", **contents)
    loaded = _kept(handle)
    problem.train(net, range(start, start + 3), rank, optimizer=optimizer)
    checkpoint.save(f"{path}/{start + 3}", **contents)
    assert problem.replicas_equal(net)
    saved = _kept(handle)
    handle.close()
    return [loaded, saved]


@pytest.mark.parametrize("kind", ["dgc", "demo"])
def test_two_four_two_ranks_conserve_what_is_unsent(kind: str, tmp_path: Path) -> None:
    before: dict[str, torch.Tensor] = {}
    for start, world_size in ((0, 2), (3, 4), (6, 2)):
        loaded, after = run_ranks(_resized, world_size, kind, str(tmp_path), start)[0]
        assert loaded.keys() == before.keys()
        for key, value in before.items():
            # means of up to four float32 numbers
            torch.testing.assert_close(
                loaded[key], value, rtol=0, atol=2**-23 * float(value.abs().max())
            )
        before = after


def _disagree(rank: int, world_size: int) -> str:
    net = problem.model()
    optimizer = DGCSGD(net.parameters(), lr=0.1, clip_norm=float(rank))
    with pytest.raises(RuntimeError) as refused:
        commkit.attach(net, optimizer)
    return str(refused.value)


def test_ranks_that_clip_differently_are_refused() -> None:
    for message in run_ranks(_disagree, 2):
        assert "scheme.optimizer.clip_norm" in message

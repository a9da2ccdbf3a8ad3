"""Bad input and bad luck under DDP: every rank hears of it, at once, and nothing hangs."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import commkit
from tests.adapters import problem
from tests.harness import run_ranks


def _refusal(action: Any) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def refusals(rank: int, world_size: int) -> dict[str, str]:
    def net() -> DDP:
        return DDP(problem.model())

    twice = net()
    commkit.attach(twice, "ddp").close()
    sparse = DDP(nn.EmbeddingBag(10, 4, sparse=True, mode="sum"))
    names = "powersgd", "sign"
    told = {
        "unknown scheme": _refusal(lambda: commkit.attach(net(), "powersdg")),
        "unknown field": _refusal(lambda: commkit.attach(net(), "powersgd", rnak=4)),
        "rank": _refusal(lambda: commkit.attach(net(), "powersgd", rank=0)),
        "rank of no matrix": _refusal(lambda: commkit.attach(net(), "powersgd", rank=97)),
        "density": _refusal(lambda: commkit.attach(net(), "topk", density=1.5)),
        "type": _refusal(lambda: commkit.attach(net(), "powersgd", rank="four")),
        "twice": _refusal(lambda: commkit.attach(twice, "ddp")),
        "not ddp": _refusal(lambda: commkit.attach(problem.model(), "ddp")),  # type: ignore[arg-type]
        "sparse": _refusal(lambda: commkit.attach(sparse, "ddp")),
        "schemes differ": _refusal(lambda: commkit.attach(net(), names[rank])),
        "knobs differ": _refusal(lambda: commkit.attach(net(), "powersgd", rank=4 + rank)),
        "seeds differ": _refusal(lambda: commkit.attach(net(), "randomk", seed=rank)),
        "one rank is wrong": _refusal(
            lambda: commkit.attach(net(), "powersgd", rank=4 if rank == 0 else -1)
        ),
        "still usable": _refusal(lambda: commkit.attach(net(), "powersgd").close()),
    }
    dist.barrier()  # nobody ends while another still connects
    return told


EXPECTED = {
    "unknown scheme": ("ConfigError", "scheme.name", "'powersdg'", "did you mean 'powersgd'"),
    "unknown field": ("ConfigError", "scheme.rnak", "did you mean 'rank'"),
    "rank": ("ConfigError", "rank=0", ">= 1"),
    "rank of no matrix": ("ValueError", "rank=97", "largest usable rank is 96", "rank=4"),
    "density": ("ConfigError", "density=1.5", "(0, 1]"),
    "type": ("ConfigError", "scheme.rank='four'", "integer"),
    "twice": ("RuntimeError", "attached already"),
    "not ddp": ("TypeError", "Sequential", "DistributedDataParallel"),
    "sparse": ("ValueError", "sparse=True", "sparse=False"),
    "schemes differ": ("RuntimeError", "ranks disagree on scheme.aggregator.name", "powersgd"),
    "knobs differ": ("RuntimeError", "scheme.aggregator.rank", "rank 0 has 4, rank 1 has 5"),
    "seeds differ": ("RuntimeError", "ranks disagree on scheme.seed"),
    "still usable": ("accepted",),
}


def test_bad_configurations_are_refused_on_every_rank() -> None:
    results = run_ranks(refusals, 2)
    for rank, told in enumerate(results):
        for case, words in EXPECTED.items():
            for word in words:
                assert word in told[case], (rank, case, told[case])
    assert "rank 1 refused to attach" in results[0]["one rank is wrong"]
    assert "rank=-1" in results[1]["one rank is wrong"]


def _no_trainable(rank: int, world_size: int) -> str:
    frozen = problem.model().requires_grad_(False)
    return _refusal(lambda: commkit.ddp_comm_hook(frozen, "powersgd"))


def test_a_model_without_trainable_parameters_is_refused() -> None:
    for message in run_ranks(_no_trainable, 2):
        assert "no parameter with requires_grad=True" in message


def raising(rank: int, world_size: int, bad_rank: int) -> tuple[float, str, str]:
    net = DDP(problem.model(), bucket_cap_mb=0.02)
    handle = commkit.attach(net, "powersgd")
    problem.train(net, range(3), rank)
    if rank == bad_rank:

        def explode(*args: Any) -> Any:
            raise ZeroDivisionError("planted")

        handle.reducer.reduce = explode  # type: ignore[method-assign]
    torch.distributed.barrier()
    start = time.monotonic()
    first = _refusal(lambda: problem.train(net, range(3, 4), rank))
    took = time.monotonic() - start
    again = _refusal(lambda: problem.loss_of(net, 4, rank).backward())
    return took, first, again


@pytest.mark.parametrize("bad_rank", [0, 2])
def test_an_exception_in_the_hook_of_one_rank_is_raised_on_all(bad_rank: int) -> None:
    for rank, (took, message, again) in enumerate(run_ranks(raising, 3, bad_rank)):
        assert "ZeroDivisionError: planted" in message, (rank, message)
        if rank != bad_rank:
            assert f"rank {bad_rank} failed" in message
        # "within a second": this also counts a backward pass on a busy machine.
        assert took < 1.5, (rank, took)
        assert "planted" in again, "the failure must latch"


def _stuck(rank: int, world_size: int) -> tuple[float, str]:
    net = DDP(problem.model())
    handle = commkit.attach(net, "ddp", timeout_s=3.0)
    problem.train(net, range(2), rank)
    if rank == 1:
        handle.reducer.reduce = lambda *args: time.sleep(60)  # type: ignore[assignment, method-assign, return-value]
    start = time.monotonic()
    message = _refusal(lambda: problem.train(net, range(2, 3), rank))
    return time.monotonic() - start, message


def test_a_stuck_reduction_ends_at_its_timeout() -> None:
    for took, message in run_ranks(_stuck, 2):
        assert "timeout_s=3" in message or "Timed out" in message
        assert 2.0 < took < 8.0


def _closed(rank: int, world_size: int) -> str:
    net = DDP(problem.model())
    handle = commkit.attach(net, "ddp")
    problem.train(net, range(2), rank)
    handle.close()
    handle.close()
    return _refusal(lambda: problem.train(net, range(2, 3), rank))


def test_a_backward_pass_after_close_raises() -> None:
    assert all("attachment is closed" in message for message in run_ranks(_closed, 2))


def _wrong_shape(rank: int, world_size: int) -> str:
    net = DDP(problem.model())
    handle = commkit.attach(net, "ddp")
    handle._reduce = lambda named, buffer, *rest: buffer[:10]  # type: ignore[method-assign]
    return _refusal(lambda: problem.train(net, range(1), rank))


def test_a_result_of_the_wrong_shape_is_caught() -> None:
    assert all("returned (10,)" in message for message in run_ranks(_wrong_shape, 2))


def _one_bad_step(rank: int, world_size: int, scheme: str) -> list[Any]:
    """Rank 1 has an inf in one weight's gradient at step 5: only some of the buckets see it."""
    net = DDP(problem.model(), bucket_cap_mb=0.02)
    handle = commkit.attach(net, scheme)
    problem.train(net, range(5), rank)
    before = {key: value.clone() for key, value in handle.state_dict().items()}
    weight = net.module[2].weight
    remove = weight.register_hook(lambda g: g.fill_(float("inf"))) if rank == 1 else None
    net.zero_grad()
    problem.loss_of(net, 5, rank).backward()
    if remove:
        remove.remove()
    seen = not bool(weight.grad.isfinite().all())
    after = handle.state_dict()
    untouched = [k for k in before if k != "shared/step" and not torch.equal(before[k], after[k])]
    flagged = handle.last_step.nonfinite
    net.zero_grad()
    problem.loss_of(net, 6, rank).backward()
    finite = all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)
    handle.close()
    return [seen, untouched, flagged, finite, len(before) == len(after)]


@pytest.mark.parametrize("scheme", ["powersgd", "sign", "topk", "randomk", "int4"])
def test_one_non_finite_step_leaves_no_trace(scheme: str) -> None:
    for outcome in run_ranks(_one_bad_step, 2, scheme):
        assert outcome == [True, [], True, True, True]


def _zero_gradient(rank: int, world_size: int, scheme: str) -> bool:
    net = DDP(problem.model(), bucket_cap_mb=0.02)
    handle = commkit.attach(net, scheme)
    for step in range(4):
        net.zero_grad()
        (problem.loss_of(net, step, rank) * (0.0 if step < 2 else 1.0)).backward()
        if not all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None):
            return False
    handle.close()
    return any(bool(p.grad.any()) for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("scheme", ["powersgd", "sign", "topk", "int8", "randomk"])
def test_zero_gradients_stay_zero_and_harmless(scheme: str) -> None:
    assert run_ranks(_zero_gradient, 2, scheme) == [True, True]

"""What a Debug finds, under DDP, at the optimizer's step and in local updates: on every rank, and by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import commkit
from commkit import Debug
from commkit.comm import DistComm
from tests.adapters import problem
from tests.harness import run_ranks


def _told(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "well"


def _differs(rank: int, wrapped: bool, scheme: Any) -> str:
    model = problem.model()
    net = DDP(model) if wrapped else model
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    handle = commkit.attach(net, scheme, optimizer, debug=Debug(check_replicas_every=2))
    told = []

    def step(number: int) -> None:
        optimizer.zero_grad()
        problem.loss_of(net, number, rank).backward()
        optimizer.step()

    for number in range(6):
        if number == 3 and rank == 2:
            with torch.no_grad():
                shared = (
                    handle.anchors.values
                    if hasattr(handle, "anchors")
                    else dict(model.named_parameters())
                )
                list(shared.values())[1].view(-1)[0] += 1e-6
        told.append(_told(lambda number=number: step(number)))
        if told[-1] != "well":
            break
    torch.distributed.barrier()
    handle.close(False) if hasattr(handle, "anchors") else handle.close()
    return f"{len(told)} {told[-1]}"


def _flipped(rank: int, scheme: str) -> str:
    """A byte of what arrives on rank 1 is another one, from the fourth message on."""
    net = DDP(problem.model())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    commkit.attach(net, scheme, optimizer, debug=Debug(wire_checksums=True))
    gather, calls = DistComm.all_gather, []

    def damaging(self: DistComm, x: torch.Tensor) -> torch.Tensor:
        rows = gather(self, x)
        if x.dtype == torch.uint8:
            calls.append(None)
            if rank == 1 and len(calls) == 4:
                rows[0, 3] ^= 1
        return rows

    DistComm.all_gather = damaging  # type: ignore[method-assign]
    try:
        return _told(lambda: problem.train(net, range(6), rank))
    finally:
        DistComm.all_gather = gather  # type: ignore[method-assign]
        torch.distributed.barrier()


DILOCO = {"name": "diloco", "sync_every": 2}


def _all(rank: int, world_size: int) -> dict[str, str]:
    model = problem.model()
    return {
        "ddp": _differs(rank, True, "powersgd"),
        "step": _differs(rank, False, "topk"),
        "outer": _differs(rank, False, DILOCO),
        "equal": _told(lambda: commkit.check_replicas(model)),
        "no optimizer": _told(
            lambda: commkit.attach(DDP(model), "topk", debug=Debug(check_replicas_every=1))
        ),
        "flipped": _flipped(rank, "topk"),
    }


def test_differences_are_named_on_every_rank() -> None:
    for rank, told in enumerate(run_ranks(_all, 3)):
        # Changed before the fourth step; DDP's gradients are reduced by the time that the optimizer steps.
        for case, found in (("ddp", 4), ("step", 5), ("outer", 5)):
            expected = (
                f"{found} ReplicasDiffer: replicas differ in 1 of 6 parameters, first in '0.bias'"
            )
            assert told[case].startswith(expected), (rank, case, told[case])
            assert "rank 2 of 3 has other bits than rank 0" in told[case]
        assert told["equal"] == "well"
        assert "counts the optimizer's steps" in told["no optimizer"]
        assert "rank 1 received other all_gather bytes from rank 0" in told["flipped"], told[
            "flipped"
        ]


def test_a_negative_period_is_refused() -> None:
    with pytest.raises(ValueError, match="check_replicas_every=-1 must be >= 0"):
        Debug(check_replicas_every=-1)

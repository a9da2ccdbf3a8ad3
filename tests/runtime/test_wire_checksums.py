"""One flipped bit on the wire is found on every rank, and its sender named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import commkit
from commkit.runtime.wire_checksums import CheckedComm, WireDamage
from commkit.sim import ThreadComm, run_threads


class Damaging:
    """A comm on which, on rank 2, one bit of what rank 1 sent arrives flipped in call number ``at`` of a kind."""

    def __init__(self, comm: ThreadComm, kind: str, at: int = 0) -> None:
        self._comm, self._kind, self._left = comm, kind, at

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._comm, name)
        if name != self._kind or self._comm.rank != 2:
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            result = found(*args, **kwargs)
            self._left -= 1
            if self._left == -1:
                message = {
                    "all_gather": lambda: result[1],
                    "all_to_all": lambda: result[1],
                    "broadcast": lambda: result,
                    "exchange": lambda: args[1][1],
                }[name]()
                message.view(torch.uint8)[message.nbytes // 2] ^= 16
            return result

        return call


CALLS: dict[str, Callable[[CheckedComm], Any]] = {
    "all_gather": lambda comm: comm.all_gather(torch.arange(5.0) + comm.rank),
    "all_to_all": lambda comm: comm.all_to_all(
        torch.arange(6, dtype=torch.int16) + 10 * comm.rank, [1, 2, 3], [comm.rank + 1] * 3
    ),
    "broadcast": lambda comm: comm.broadcast(torch.full((3,), float(comm.rank)), 1),
    "exchange": lambda comm: comm.exchange(
        {(comm.rank + 1) % 3: torch.full((4,), comm.rank)},
        {(comm.rank - 1) % 3: torch.zeros(4, dtype=torch.int64)},
    ),
    "all_reduce": lambda comm: comm.all_reduce(torch.arange(7.0) * (comm.rank + 1)),
}


@pytest.mark.parametrize("op", CALLS)
def test_nothing_is_changed_by_checking(op: str) -> None:
    plain = run_threads(lambda comm: CALLS[op](comm), 3)  # type: ignore[arg-type]
    checked = run_threads(lambda comm: CALLS[op](CheckedComm(comm)), 3)
    for expected, found in zip(plain, checked, strict=True):
        pairs = (
            zip(expected, found, strict=True) if isinstance(expected, list) else [(expected, found)]
        )
        for a, b in pairs:
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        ("all_gather", "all_gather"),
        ("all_to_all", "all_to_all"),
        ("broadcast", "broadcast"),
        ("exchange", "exchange"),
        ("all_reduce", "all_to_all"),
        ("all_reduce", "all_gather"),
    ],
)
def test_a_flipped_bit_is_found(op: str, kind: str) -> None:
    # The all-gather of an all-reduce is its second: the first tells how the all-to-all went.
    at = 1 if (op, kind) == ("all_reduce", "all_gather") else 0

    def body(comm: ThreadComm) -> str:
        try:
            CALLS[op](CheckedComm(Damaging(comm, kind, at)))  # type: ignore[arg-type]
        except WireDamage as damage:
            return str(damage)
        return ""

    told = run_threads(body, 3)
    assert "rank 2 received other" in told[2]
    assert "from rank 1" in told[2]
    assert told[:2] == (["", ""] if op == "exchange" else [told[2]] * 2)


@pytest.mark.parametrize("scheme", ["powersgd", "topk", "int4", "ddp"])
def test_schemes_run_with_checksums(scheme: str) -> None:
    def body(comm: ThreadComm, checked: bool) -> torch.Tensor:
        reducer = commkit.schemes.make_reducer({"name": scheme}, {})
        used = CheckedComm(comm) if checked else comm
        generator = torch.Generator().manual_seed(comm.rank)
        for _ in range(3):
            x = torch.randn(64, 48, generator=generator)
            out = reducer.reduce({"x": x}, used)["x"].clone()
            reducer.end_step()
        return out

    plain, checked = (run_threads(lambda c, on=on: body(c, on), 3) for on in (False, True))
    for a, b in zip(plain, checked, strict=True):
        assert torch.equal(a, b)

"""A step whose reduction failed on the way, at whichever collective, never happened: bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from commkit.comm import CollectiveError
from commkit.sim import ThreadComm, run_threads

from .scheme_cases import BLOCKS, OPTIMIZER_BLOCKS, built, copied, finish, gradients

_COLLECTIVES = ("all_reduce", "all_gather", "all_to_all", "broadcast", "all_gather_object")


class Failing:
    """A comm on which, once asked to, the collective after ``left`` others fails on all ranks, as when one is lost."""

    def __init__(self, comm: ThreadComm) -> None:
        self._comm = comm
        self.left: int | None = None
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._comm, name)
        if name not in _COLLECTIVES:
            return found

        def collective(*args: Any, **kwargs: Any) -> Any:
            if self.calls == self.left:
                raise CollectiveError("a peer is lost")
            self.calls += 1
            return found(*args, **kwargs)

        return collective


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


_CASES = [
    *(case for case in BLOCKS if case.endswith("-all")),
    "signum",
    "powersgd-2",
    "powersgd-alternating",
    "ef21-momentum",
    "sign-gathered",
    "topk-two-shot",
    *OPTIMIZER_BLOCKS,
]


# Nodes cannot lose a rank: attach refuses hierarchical schemes together with members that change.
@pytest.mark.parametrize("case", _CASES)
def test_a_step_that_was_given_up_leaves_no_trace(case: str) -> None:
    def body(comm: ThreadComm) -> int:
        lost, kept = Failing(comm), Failing(comm)
        reducer, twin = built(case), built(case)
        for step in range(2):
            for each in (reducer, twin):
                finish(each, copied(each.reduce(gradients(comm.rank, step), comm)))
        before = copied(reducer.state_dict())
        expected = copied(twin.reduce(gradients(comm.rank, 2), kept))
        finish(twin, expected)
        for failing_at in range(kept.calls):
            lost.calls, lost.left = 0, failing_at
            with pytest.raises(CollectiveError):
                reducer.reduce(gradients(comm.rank, 2), lost)
            reducer.abandon()
            assert _same(copied(reducer.state_dict()), before), f"collective {failing_at}"
        outs = copied(reducer.reduce(gradients(comm.rank, 2), comm))
        assert _same(outs, expected)
        finish(reducer, outs)
        assert _same(reducer.state_dict(), twin.state_dict())
        return kept.calls

    assert run_threads(body, 2)[0] > 0

"""Saving, loading and splitting runs: state is keyed by name and complete."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from commkit.reducer import Reducer
from commkit.sim import ThreadComm, run_threads

from .scheme_cases import BLOCKS, SHAPES, Tensors, build, copied, gradients

every_scheme = pytest.mark.parametrize("case", BLOCKS)
STEPS, BREAK = 5, 2


def equal(first: list[Tensors], second: list[Tensors]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(first, second, strict=True)
    )


def reduced(reducer: Reducer, comm: ThreadComm, steps: Sequence[int]) -> list[Tensors]:
    outs = []
    for step in steps:
        outs.append(copied(reducer.reduce(gradients(comm.rank, step), comm)))
        reducer.end_step()
    return outs


@pytest.mark.parametrize("world_size", [1, 3])
@every_scheme
def test_a_resumed_run_continues_bit_for_bit(case: str, world_size: int) -> None:
    def body(comm: ThreadComm) -> bool:
        whole, before, after = build(case), build(case), build(case)
        expected = reduced(whole, comm, range(STEPS))
        first = reduced(before, comm, range(BREAK))
        saved = before.state_dict()
        after.load_state_dict({key: x.clone() for key, x in saved.items()})
        second = reduced(after, comm, range(BREAK, STEPS))
        return equal(first + second, expected) and equal([after.state_dict()], [whole.state_dict()])

    assert all(run_threads(body, world_size))


@every_scheme
def test_saved_state_is_a_snapshot(case: str) -> None:
    """Steps after a save must not change what was saved: a checkpoint may be written later."""

    def body(comm: ThreadComm) -> bool:
        reducer = build(case)
        reduced(reducer, comm, range(BREAK))
        saved = reducer.state_dict()
        before = copied(saved)
        reduced(reducer, comm, range(BREAK, STEPS))
        return equal([saved], [before])

    assert all(run_threads(body, 2))


@every_scheme
def test_state_is_plain_tensors_by_name(case: str) -> None:
    def body(comm: ThreadComm) -> bool:
        reducer = build(case)
        reduced(reducer, comm, range(1))
        state = reducer.state_dict()
        return all(type(key) is str and type(x) is torch.Tensor for key, x in state.items())

    assert all(run_threads(body, 2))


@every_scheme
def test_buckets_do_not_matter(case: str) -> None:
    """One call with all tensors, or several calls in another order each step: the same bits."""
    keys = list(SHAPES)

    def body(comm: ThreadComm) -> bool:
        at_once, in_buckets = build(case), build(case)
        for step in range(4):
            expected = copied(at_once.reduce(gradients(comm.rank, step), comm))
            at_once.end_step()
            order, size = keys[step:] + keys[:step], 1 + step
            outs: Tensors = {}
            for i in range(0, len(keys), size):
                bucket = gradients(comm.rank, step)
                part = in_buckets.reduce({key: bucket[key] for key in order[i : i + size]}, comm)
                outs |= copied(part)
            in_buckets.end_step()
            if not equal([outs], [expected]):
                return False
        return True

    assert all(run_threads(body, 2))


@every_scheme
def test_two_runs_give_the_same_bits(case: str) -> None:
    def body(comm: ThreadComm) -> list[Tensors]:
        return reduced(build(case), comm, range(2))

    for first, second in zip(run_threads(body, 2), run_threads(body, 2), strict=True):
        assert equal(first, second)


@every_scheme
def test_torchs_generator_is_not_touched(case: str) -> None:
    before = torch.get_rng_state()
    run_threads(lambda comm: reduced(build(case), comm, range(2)), 2)
    assert torch.equal(torch.get_rng_state(), before)

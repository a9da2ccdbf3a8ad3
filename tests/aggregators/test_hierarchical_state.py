"""State of hierarchical reducers: resumed bit for bit, and conserved when ranks and nodes change."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from commkit.aggregators.nodes import placement
from commkit.checkpoint import merge
from commkit.sim import ThreadComm, run_threads
from commkit.types import StateDict

from .hierarchy import SCHEMES, SHAPES, Run, between, gradients, run, unsent

EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("at", [1, 2])
def test_a_resumed_run_continues_bit_for_bit(scheme: str, at: int) -> None:
    whole = run(between(scheme, 2), 4, range(5), gradients)
    first = run(between(scheme, 2), 4, range(at), gradients)
    states = [seen.state for seen in first]
    second = run(between(scheme, 2), 4, range(at, 5), gradients, states)
    for expected, before, after in zip(whole, first, second, strict=True):
        for a, b in zip(expected.outs, before.outs + after.outs, strict=True):
            assert all(torch.equal(a[key], b[key]) for key in SHAPES)
        assert expected.state.keys() == after.state.keys()
        assert all(torch.equal(expected.state[k], after.state[k]) for k in after.state)


def test_what_is_loaded_is_what_is_saved_before_the_first_step() -> None:
    states = [seen.state for seen in run(between("sign", 2), 4, range(2), gradients)]
    for source in (states, [merge(states)] * 4):
        again = run(between("sign", 2), 4, range(0), gradients, source)
        for given, seen in zip(source, again, strict=True):
            assert given.keys() == seen.state.keys()
            assert all(torch.equal(given[key], seen.state[key]) for key in given)


def total(runs: Sequence[Run], key: str) -> torch.Tensor:
    return torch.stack([outs[key] for outs in runs[0].outs]).sum(0)


def resized(
    scheme: str, layout: tuple[int, int], steps: range, states: list[StateDict]
) -> list[Run]:
    nodes, local = layout
    merged = [merge(states)] * (nodes * local) if states else []
    return run(between(scheme, local), nodes * local, steps, gradients, merged)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "int8"])
@pytest.mark.parametrize(
    "layouts",
    [
        [(2, 1), (2, 2), (2, 1)],  # 2 -> 4 -> 2 ranks
        [(2, 1), (4, 1), (2, 2)],  # more nodes, then fewer of the same ranks
        [(2, 2), (3, 2), (1, 2)],  # at last a single node, which sends everything
        [(3, 2), (2, 3), (1, 1)],
    ],
    ids=str,
)
def test_the_sum_is_conserved_when_ranks_and_nodes_change(
    scheme: str, layouts: list[tuple[int, int]]
) -> None:
    """Results and what is left unsent add up to the mean gradients of all three jobs."""
    states: list[StateDict] = []
    arrived = {key: torch.zeros(shape, dtype=torch.float64) for key, shape in SHAPES.items()}
    given = {key: x.clone() for key, x in arrived.items()}
    for job, layout in enumerate(layouts):
        steps = range(3 * job, 3 * job + 3)
        if states:
            merged = merge(states)
            for key in SHAPES:
                torch.testing.assert_close(unsent([merged], key), unsent(states, key), **EXACT)
        runs = resized(scheme, layout, steps, states)
        states = [seen.state for seen in runs]
        for key in SHAPES:
            ranks = range(layout[0] * layout[1])
            given[key] += sum(gradients(r, s)[key] / len(ranks) for r in ranks for s in steps)
            arrived[key] += total(runs, key)
            left = unsent(states, key)
            torch.testing.assert_close(arrived[key] + left, given[key], **EXACT)


def test_a_merged_subspace_is_that_of_its_owner() -> None:
    """Ranks keep Q of what they serve only: what others once loaded must not come back."""
    states: list[StateDict] = []
    for job, layout in enumerate([(2, 1), (2, 2), (2, 1)]):
        runs = resized("powersgd", layout, range(3 * job, 3 * job + 3), states)
        states = [seen.state for seen in runs]
        for key in ("first", "third", "conv", "last"):
            name = f"aggregator/aggregator/shared/{key}"
            held = [state[name] for state in states if name in state]
            assert len(held) == layout[0]
            assert all(torch.equal(q, merge(states)[name]) for q in held)


@pytest.mark.parametrize("scheme", ["powersgd", "sign"])
def test_residuals_of_other_nodes_are_refused_at_the_same_number_of_ranks(scheme: str) -> None:
    """Each rank would find some that it does not serve, and they would be lost."""
    states = [seen.state for seen in run(between(scheme, 2), 4, range(2), gradients)]

    def body(comm: ThreadComm) -> str:
        reducer = between(scheme, 4)()
        reducer.load_state_dict(states[comm.rank])
        try:
            reducer.aggregator._take_loaded(placement(comm, 4, None))
        except ValueError as error:
            return str(error)
        return ""

    messages = run_threads(body, 4)
    assert any("resume with the local_size that saved it" in message for message in messages)

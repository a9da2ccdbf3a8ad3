"""Push-sum: mass and momentum of what travels one way."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from commkit.outer import GossipSchedule, PushSum, SyncOptions
from commkit.outer.topologies import DirectedGraph, OnePeerExponential, Ring, Topology
from tests.harness import ThreadComm, run_threads
from tests.outer.gossiping import SIZE, Point, drift, exchanges_only, still, walk
from tests.outer.lossy import LossyComm

OPEN = SyncOptions(final_sync=False)
# Every rank sends to the next, the first to the third too: rows do not add up to 1.
LOPSIDED = DirectedGraph([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2]])
EVERY = pytest.mark.parametrize(
    "topology", [None, LOPSIDED, Ring()], ids=["default", "graph", "ring"]
)


def _push(topology: Topology | None = None, **knobs: Any) -> Any:
    return functools.partial(PushSum, **{"topology": topology, "options": OPEN, **knobs})


def _starts(world_size: int) -> Tensor:
    return torch.stack([Point(rank).vector for rank in range(world_size)])


def _trace(
    comm: Any, steps: int, gradient: Any = still, **knobs: Any
) -> list[tuple[Tensor, float]]:
    """(z, w) after each step."""
    seen: list[tuple[Tensor, float]] = []
    walk(
        comm,
        _push(**knobs),
        steps,
        gradient=gradient,
        start=lambda rank: Point(rank).vector,
        each=lambda step, model, outer: seen.append((model.vector, outer.w)),
    )
    return seen


@EVERY
@pytest.mark.parametrize("wire_dtype", ["fp32", "bf16"])
def test_mass_and_sum_are_conserved_and_all_come_to_the_mean(
    topology: Topology | None, wire_dtype: str
) -> None:
    run = functools.partial(_trace, steps=60, topology=topology, wire_dtype=wire_dtype)
    runs = run_threads(run, 4)
    total = _starts(4).double().sum(0)
    for at in (0, 1, 9, 59):
        states = [seen[at] for seen in runs]
        assert sum(w for _, w in states) == pytest.approx(4, abs=1e-9)
        torch.testing.assert_close(
            torch.stack([z.double() * w for z, w in states]).sum(0), total, rtol=0, atol=2e-5
        )
    tolerance = 1e-5 if wire_dtype == "fp32" else 2e-2
    for seen in runs:
        torch.testing.assert_close(seen[-1][0].double(), total / 4, rtol=0, atol=tolerance)
    if topology is LOPSIDED:
        assert len({round(seen[-1][1], 3) for seen in runs}) > 1


def test_the_recurrence() -> None:
    runs = run_threads(functools.partial(_trace, steps=8, gradient=drift, topology=LOPSIDED), 4)
    p = LOPSIDED.mixing(4).matrix(0)
    x, w = _starts(4).double().numpy(), np.ones(4)
    for step in range(8):
        z = x / w[:, None]
        targets = np.stack([np.linspace(-1, 1, SIZE) * (r + 1) + 0.1 * step for r in range(4)])
        x, w = p @ (x - 0.1 * (z - targets)), p @ w
        got = torch.stack([seen[step][0] for seen in runs]).double().numpy()
        np.testing.assert_allclose(got, x / w[:, None], rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose([seen[step][1] for seen in runs], w, rtol=1e-12)


def test_one_peer_exponential_is_exact_after_log_n_rounds() -> None:
    for seen in run_threads(functools.partial(_trace, steps=2), 4):
        torch.testing.assert_close(seen[-1][0], _starts(4).mean(0))


@pytest.mark.parametrize(("wire_dtype", "width"), [("fp32", 4), ("bf16", 2)])
def test_a_round_sends_the_parameters_and_the_mass(wire_dtype: str, width: int) -> None:
    def run(comm: ThreadComm) -> dict[str, int]:
        method = _push(wire_dtype=wire_dtype, sync_every=2)
        return walk(comm, method, 6, after=lambda model, outer: exchanges_only(outer))

    for counted in run_threads(run, 3):
        assert counted == {"outer/exchange": 3 * (SIZE * width + 8)}


def test_a_lost_message_takes_both_along() -> None:
    """Ranks 1 and 2 never hear of each other. The rest's mass stays, and z a weighted mean of starts."""

    def run(comm: ThreadComm) -> list[tuple[Tensor, float]]:
        lossy = LossyComm(comm, lambda rank, peer, tag: {rank, peer} == {1, 2})
        return _trace(lossy, 80)

    runs = run_threads(run, 4)
    assert sum(seen[-1][1] for seen in runs) == pytest.approx(4)
    z = torch.stack([seen[-1][0] for seen in runs])
    torch.testing.assert_close(z, _starts(4).mean(0).expand_as(z), rtol=0, atol=1e-4)


def test_a_rank_that_is_not_finite_gives_its_last_round() -> None:
    def poison(rank: int, step: int, model: Point) -> None:
        still(rank, step, model)
        if rank == 1 and step == 3:
            model.x.grad = torch.full_like(model.x, torch.nan)

    runs = run_threads(functools.partial(_trace, steps=40, gradient=poison), 4)
    for seen in runs:
        torch.testing.assert_close(seen[-1][0], _starts(4).mean(0), rtol=0, atol=1e-5)


def test_too_little_mass_makes_for_a_restart() -> None:
    """Of three in a directed ring, two of whom give nearly everything away and get nearly nothing."""

    def run(comm: ThreadComm) -> tuple[Tensor, float, int]:
        def each(step: int, model: Point, outer: Any) -> None:
            if step == 0:
                outer.w = 1.0 if comm.rank == 2 else 1e-5

        return walk(
            comm,
            _push(DirectedGraph([[0, 1], [1, 2], [2, 0]])),
            2,
            gradient=still,
            start=lambda rank: torch.full((SIZE,), float(rank)),
            each=each,
            after=lambda model, outer: (model.vector, outer.w, outer.restarts),
        )

    (_z0, w0, n0), (z1, w1, n1), (_z2, w2, n2) = run_threads(run, 3)
    assert (n0, n1, n2) == (0, 1, 0)
    assert w1 == 1.0
    assert w0 == pytest.approx(0.5, abs=1e-4)
    assert w2 == pytest.approx(0.5, abs=1e-4)
    # After the first round z is (1, 0.5, 1.5); rank 1 takes rank 0's.
    torch.testing.assert_close(z1, torch.full((SIZE,), 1.0))


def test_the_merge_divides_the_sum_by_the_mass() -> None:
    def run(comm: ThreadComm) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        merged = walk(
            comm,
            functools.partial(PushSum, topology=LOPSIDED),
            3,
            gradient=still,
            start=lambda rank: Point(rank).vector,
            each=lambda step, model, outer: seen.append(model.vector),
        )
        return merged, seen[-1]

    results = run_threads(run, 4)
    for merged, before in results:
        assert torch.equal(merged, results[0][0])
        assert not torch.equal(merged, before)
        torch.testing.assert_close(merged, _starts(4).mean(0))


def test_a_schedule_with_a_merge() -> None:
    schedule = GossipSchedule(0.0, windows=[(1, 2, "gossip"), (2, 3, "merge")])
    runs = run_threads(functools.partial(_trace, steps=3, topology=LOPSIDED, schedule=schedule), 4)
    for seen in runs:
        assert seen[0][1] == 1
        torch.testing.assert_close(seen[2][0], _starts(4).mean(0))
        assert seen[2][1] == pytest.approx(1)


def test_one_rank_alone_trains() -> None:
    alone = run_threads(lambda comm: walk(comm, _push(), 5), 1)[0]
    model = Point(0)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        drift(0, step, model)
        inner.step()
    torch.testing.assert_close(alone, model.vector)


def test_default_topology() -> None:
    model = Point(0)
    outer = PushSum(model, torch.optim.SGD(model.parameters()))
    assert outer.topology == OnePeerExponential()

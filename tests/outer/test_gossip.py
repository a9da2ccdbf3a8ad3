"""Gossip SGD: what mixing conserves, how fast it agrees, and when it talks."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from commkit.outer import GossipSchedule, GossipSGD, OuterSync, SyncOptions
from commkit.outer.topologies import (
    Complete,
    DirectedGraph,
    Graph,
    Hypercube,
    OnePeerExponential,
    RandomPairs,
    Ring,
    RoundRobin,
    StaticExponential,
    Topology,
    Torus,
)
from tests.harness import ThreadComm, run_threads
from tests.outer.gossiping import SIZE, Point, drift, exchanges_only, spread, still, walk
from tests.outer.lossy import LossyComm
from tests.outer.problem import Net, inner_step

OPEN = SyncOptions(final_sync=False)
STAR = Graph([[0, 1], [0, 2], [0, 3]])
TOPOLOGIES: list[Topology] = [
    Ring(),
    Torus(2, 2),
    StaticExponential(),
    OnePeerExponential(),
    Hypercube(),
    RoundRobin(),
    RandomPairs(seed=3),
    STAR,
    Complete(),
]
EVERY = pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: type(t).__name__)


def _gossip(topology: Topology | None = None, **knobs: Any) -> Any:
    return functools.partial(GossipSGD, **{"topology": topology, "options": OPEN, **knobs})


def _starts(world_size: int) -> Tensor:
    return torch.stack([Point(rank).vector for rank in range(world_size)])


def _mix(comm: ThreadComm, rounds: int, **knobs: Any) -> list[Tensor]:
    """Mixing alone, from different weights; the weights after each round."""
    seen: list[Tensor] = []
    walk(
        comm,
        _gossip(**knobs),
        rounds,
        gradient=still,
        start=lambda rank: Point(rank).vector,
        each=lambda step, model, outer: seen.append(model.vector),
    )
    return seen


@EVERY
def test_rounds_are_the_topologys_matrices(topology: Topology) -> None:
    runs = run_threads(functools.partial(_mix, rounds=5, topology=topology), 4)
    x, mixing = _starts(4).double().numpy(), topology.mixing(4)
    for round_number in range(5):
        x = mixing.matrix(round_number) @ x
        got = torch.stack([seen[round_number] for seen in runs]).double().numpy()
        np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("topology", "wire_dtype"), [(RandomPairs(), "bf16"), (OnePeerExponential(), "fp32")]
)
def test_a_thousand_rounds_conserve_the_mean(topology: Topology, wire_dtype: str) -> None:
    run = functools.partial(_mix, rounds=1000, topology=topology, wire_dtype=wire_dtype)
    runs = run_threads(run, 4, timeout_s=120)
    before = _starts(4).double().mean(0)
    for at in (9, 99, 999):
        after = torch.stack([seen[at] for seen in runs]).double().mean(0)
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


# Of random pairs it holds in expectation only.
@pytest.mark.parametrize(
    "topology",
    [t for t in TOPOLOGIES if not isinstance(t, RandomPairs)],
    ids=lambda t: type(t).__name__,
)
def test_contraction_is_no_slower_than_the_gap_says(topology: Topology) -> None:
    runs = run_threads(functools.partial(_mix, rounds=4, topology=topology), 4)
    mixing = topology.mixing(4)
    before, after = spread(list(_starts(4))), spread([seen[-1] for seen in runs])
    assert after <= (1 - mixing.gap()) ** 8 * before * (1 + 1e-4) + 1e-12


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_steps_of_gossip_are_a_power_of_the_matrix(steps: int) -> None:
    runs = run_threads(functools.partial(_mix, rounds=2, topology=Ring(), gossip_steps=steps), 5)
    power = np.linalg.matrix_power(Ring().mixing(5).matrix(0), 2 * steps)
    expected = power @ _starts(5).double().numpy()
    got = torch.stack([seen[-1] for seen in runs]).double().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_log_n_steps_of_one_peer_exponential_are_the_exact_mean() -> None:
    run = functools.partial(_mix, rounds=1, topology=OnePeerExponential(), gossip_steps=2)
    for seen in run_threads(run, 4):
        torch.testing.assert_close(seen[0], _starts(4).mean(0))


def _recurrence(overlap: bool, steps: int, matrix: Any) -> Tensor:
    x = torch.zeros(4, SIZE, dtype=torch.float64) + Point(0).vector
    w = torch.from_numpy(matrix)
    for step in range(steps):
        targets = torch.stack(
            [torch.linspace(-1, 1, SIZE) * (r + 1) + 0.1 * step for r in range(4)]
        )
        d = 0.1 * (x - targets)
        if overlap:  # what is in flight began with the weights before this step
            x = (w @ x if step else x) - d
        else:
            x = w @ (x - d)
    return x


@pytest.mark.parametrize("overlap", [False, True])
def test_the_recurrences(overlap: bool) -> None:
    def run(comm: ThreadComm) -> Tensor:
        method = _gossip(Ring(), overlap=overlap)
        return walk(comm, method, 7, after=lambda model, outer: model.vector)

    got = torch.stack(run_threads(run, 4)).double()
    expected = _recurrence(overlap, 7, Ring().mixing(4).matrix(0))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_mean_trains_as_if_all_had_averaged_gradients() -> None:
    """With gradients that do not depend on the weights."""

    def fixed(rank: int, step: int, model: Point) -> None:
        model.x.grad = torch.full_like(model.x, float(rank) + step)
        model.y.grad = torch.zeros_like(model.y)

    def run(comm: ThreadComm) -> Tensor:
        return walk(comm, _gossip(sync_every=3), 9, gradient=fixed)

    mean = torch.stack(run_threads(run, 5)).mean(0)
    expected = Point(0).vector
    expected[:-1] -= 0.1 * sum(2.0 + step for step in range(9))
    torch.testing.assert_close(mean, expected)


@pytest.mark.parametrize(
    ("topology", "degree"),
    [
        (Ring(), 2),
        (StaticExponential(), 2),
        (OnePeerExponential(), 1),
        (RandomPairs(), 1),
        (Complete(), 3),
    ],
    ids=lambda t: type(t).__name__,
)
@pytest.mark.parametrize(("wire_dtype", "width"), [("fp32", 4), ("bf16", 2)])
def test_bytes_are_the_formula_and_no_collective_is_issued(
    topology: Topology, degree: int, wire_dtype: str, width: int
) -> None:
    def run(comm: ThreadComm) -> dict[str, int]:
        method = _gossip(topology, wire_dtype=wire_dtype, sync_every=2, gossip_steps=2)
        return walk(comm, method, 6, after=lambda model, outer: exchanges_only(outer))

    for counted in run_threads(run, 4):
        assert counted == {"outer/exchange": 3 * 2 * degree * SIZE * width}


@pytest.mark.parametrize(
    "topology", [Ring(), RandomPairs(), OnePeerExponential()], ids=["r", "p", "o"]
)
def test_what_does_not_arrive_stays_with_who_misses_it(topology: Topology) -> None:
    def run(comm: ThreadComm) -> tuple[Tensor, int]:
        lossy = LossyComm(comm, lambda rank, peer, tag: {rank, peer} == {1, 2})
        return walk(
            lossy,  # type: ignore[arg-type]
            _gossip(topology),
            6,
            gradient=still,
            start=lambda rank: Point(rank).vector,
            after=lambda model, outer: (model.vector, outer.peers.missed),
        )

    results = run_threads(run, 4)
    x, mixing, missed = _starts(4).double().numpy(), topology.mixing(4), 0
    for round_number in range(6):
        matrix = mixing.matrix(round_number).copy()
        for one, other in ((1, 2), (2, 1)):
            missed += matrix[one, other] > 0
            matrix[one, one] += matrix[one, other]
            matrix[one, other] = 0
        x = matrix @ x
    got = torch.stack([vector for vector, _ in results]).double().numpy()
    np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-6)
    assert sum(count for _, count in results) == missed > 0
    if mixing.symmetric:
        np.testing.assert_allclose(got.mean(0), _starts(4).double().numpy().mean(0), atol=1e-6)


def test_survivors_that_agree_lay_out_anew() -> None:
    """Ranks 0, 1 and 3 go on as a line, with Metropolis weights, once all of them know."""

    def run(comm: ThreadComm) -> Tensor | None:
        def each(step: int, model: Point, outer: OuterSync) -> None:
            if step == 1:
                assert isinstance(outer, GossipSGD)
                outer.exclude([2])

        if comm.rank == 2:
            walk(comm, _gossip(Ring()), 2, gradient=still, start=lambda rank: Point(rank).vector)
            return None
        return walk(
            comm,
            _gossip(Ring()),
            5,
            gradient=still,
            start=lambda rank: Point(rank).vector,
            each=each,
            after=lambda model, outer: model.vector,
        )

    results = run_threads(run, 4)
    mixing = Ring().mixing(4)
    x = np.linalg.matrix_power(mixing.matrix(0), 2) @ _starts(4).double().numpy()
    left = mixing.without([2])
    x = np.linalg.matrix_power(left.matrix(0), 3) @ x[[0, 1, 3]]
    got = torch.stack([r for r in results if r is not None]).double().numpy()
    np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("overlap", [False, True])
def test_what_is_not_finite_is_healed_by_the_neighbours(overlap: bool) -> None:
    def poison(rank: int, step: int, model: Point) -> None:
        drift(rank, step, model)
        if rank == 1 and step == 2:
            model.x.grad[0] = torch.inf

    def run(comm: ThreadComm) -> tuple[Tensor, int]:
        method = _gossip(Ring(), overlap=overlap)
        return walk(
            comm,
            method,
            6,
            gradient=poison,
            after=lambda model, outer: (model.vector, outer.peers.suspects[1]),
        )

    results = run_threads(run, 4)
    assert all(bool(x.isfinite().all()) for x, _ in results)
    assert [suspected > 0 for _, suspected in results] == [True, False, True, False]


# Schedules.


def test_a_schedule_is_a_function_of_seed_and_round() -> None:
    mixing = RandomPairs().mixing(8)
    plans = [
        [GossipSchedule(0.2, seed=seed).neighbours(mixing, rank, r, r) for rank in range(8)]
        for seed in (1, 1, 2)
        for r in range(200)
    ]
    assert plans[:200] == plans[200:400] != plans[400:]
    met = sum(len(plan.sends) for of_round in plans for plan in of_round)
    assert 0.17 < met / (600 * 8) < 0.23
    for of_round in plans:
        for rank, plan in enumerate(of_round):
            assert plan.sends == plan.receives
            assert plan.self_weight + sum(plan.receives.values()) == pytest.approx(1)
            assert all(of_round[peer].sends == {rank: 0.5} for peer in plan.sends)


def test_one_way_links_are_used_by_all_or_none() -> None:
    schedule, mixing = GossipSchedule(0.5), OnePeerExponential().mixing(6)
    for r in range(40):
        plans = [schedule.neighbours(mixing, rank, r, r) for rank in range(6)]
        assert len({len(plan.sends) for plan in plans}) == 1


def test_windows_decide_over_coins() -> None:
    schedule = GossipSchedule(0.0, windows=[(2, 4, "gossip"), (5, 6, "merge"), (3, 9, "none")])
    assert [schedule.mode(r) for r in range(10)] == [
        *[None, None, "gossip", "gossip", "none", "merge"],
        *["none", "none", "none", None],
    ]

    def run(comm: ThreadComm) -> tuple[list[Tensor], int]:
        seen = _mix(comm, 6, topology=Ring(), schedule=schedule)
        return seen, 0

    runs = [seen for seen, _ in run_threads(run, 4)]
    starts = _starts(4)
    for rank, seen in enumerate(runs):
        assert torch.equal(seen[1], starts[rank])
        assert not torch.equal(seen[2], seen[1])
        assert torch.equal(seen[4], seen[3])
        assert torch.equal(seen[5], runs[0][5])
        torch.testing.assert_close(seen[5], starts.mean(0))


def test_rounds_without_a_meeting_cost_nothing() -> None:
    def run(comm: ThreadComm) -> tuple[int, dict[str, int]]:
        method = _gossip(schedule=GossipSchedule(0.0))
        return walk(comm, method, 5, after=lambda m, outer: (outer.round, exchanges_only(outer)))

    assert run_threads(run, 3) == [(5, {})] * 3


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_merge_is_the_exact_mean_on_every_rank(world_size: int) -> None:
    def run(comm: ThreadComm) -> tuple[Tensor, Tensor, dict[str, int]]:
        box: list[Any] = []
        method = functools.partial(GossipSGD, topology=RandomPairs(), sync_every=2)
        merged = walk(
            comm, method, 5, each=lambda s, model, outer: box.append((model.vector, outer))
        )
        return merged, box[-1][0], exchanges_only(box[-1][1])

    results = run_threads(run, world_size)
    mean = torch.stack([before for _, before, _ in results]).double().mean(0)
    for merged, _, counted in results:
        assert torch.equal(merged, results[0][0])
        torch.testing.assert_close(merged.double(), mean, rtol=0, atol=1e-6)
        assert set(counted) <= {"outer/exchange"}


def test_a_merge_moves_as_many_bytes_as_a_ring() -> None:
    """2 (W-1)/W of the message, which has one more element, and a few bytes to call the roll."""

    def run(comm: ThreadComm) -> tuple[int, int]:
        model = torch.nn.Linear(100, 100)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        with _gossip()(model, inner, process_group=comm) as outer:
            before = exchanges_only(outer).get("outer/exchange", 0)
            outer.merge()
            return exchanges_only(outer)["outer/exchange"] - before, outer.peers.missed

    for size, missed in run_threads(run, 4):
        assert missed == 0
        assert 0 <= size - 2 * 3 * 4 * 10101 / 4 < 64


def test_a_merge_goes_on_without_who_is_lost() -> None:
    def run(comm: ThreadComm) -> Tensor | None:
        lossy = LossyComm(comm, lambda rank, peer, tag: 2 in (rank, peer))
        if comm.rank == 2:
            with pytest.raises(AssertionError, match="stop here"):
                walk(lossy, functools.partial(GossipSGD, topology=Ring()), 0, after=_stop)  # type: ignore[arg-type]
            return None
        method = functools.partial(GossipSGD, topology=Ring())
        return walk(lossy, method, 4)  # type: ignore[arg-type]

    def _stop(model: Point, outer: OuterSync) -> None:
        raise AssertionError("stop here")

    one, other, dead, last = run_threads(run, 4)
    assert dead is None
    assert one is not None
    assert torch.equal(one, other)
    assert torch.equal(one, last)


def test_probe_merge_evaluates_the_mean_and_leaves_no_trace() -> None:
    def run(comm: ThreadComm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        model = Net(comm.rank)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        with _gossip()(model, inner, process_group=comm) as outer:
            for step in range(3):
                inner_step(model, inner, comm.rank, step)
            before = {n: x.clone() for n, x in model.state_dict().items()}
            seen = outer.probe_merge(
                lambda m: (m.first.weight.detach().clone(), m.norm.running_var.clone())
            )
            after = model.state_dict()
            assert all(torch.equal(x, after[name]) for name, x in before.items())
            return *seen, before["first.weight"], before["norm.running_var"]

    results = run_threads(run, 3)
    for seen, live in ((0, 2), (1, 3)):
        mean = torch.stack([r[live] for r in results]).mean(0)
        for r in results:
            assert torch.equal(r[seen], results[0][seen])
            torch.testing.assert_close(r[seen], mean)
            assert not torch.equal(r[seen], r[live])


def test_consensus_distance() -> None:
    def run(comm: ThreadComm) -> float:
        vector = torch.full((SIZE,), 3.0 if comm.rank else 1.0)
        return walk(
            comm,
            _gossip(),
            0,
            start=lambda rank: vector,
            after=lambda model, outer: outer.consensus_distance(),
        )

    assert run_threads(run, 2) == pytest.approx([0.5, 0.5])


# Bad input.


@pytest.mark.parametrize(
    ("topology", "world_size", "message"),
    [
        (Hypercube(), 3, "must be a power of two"),
        (Graph([[0, 1], [2, 3]]), 4, "not connected"),
        (Torus(2, 2), 3, "product must be 3"),
        (DirectedGraph([[0, 1], [1, 2], [2, 0], [0, 2]]), 3, "use PushSum"),
    ],
)
def test_topologies_that_do_not_fit_are_refused(
    topology: Topology, world_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_threads(lambda comm: walk(comm, _gossip(topology), 1), world_size)


def test_bad_knobs() -> None:
    model = Point(0)
    inner = torch.optim.SGD(model.parameters())
    for knobs, message in (
        ({"gossip_steps": 0}, "gossip_steps=0"),
        ({"gossip_steps": 33}, "gossip_steps=33"),
        ({"sync_every": 0}, "sync_every=0"),
    ):
        with pytest.raises(ValueError, match=message):
            GossipSGD(model, inner, **knobs)
    with pytest.raises(ValueError, match=r"p_gossip=1\.5"):
        GossipSchedule(1.5)
    for window in ((3, 3, "none"), (0, 2, "pair"), (0, 2)):
        with pytest.raises(ValueError, match="windows"):
            GossipSchedule(windows=[window])  # type: ignore[list-item]


def test_ranks_with_different_schedules_do_not_start() -> None:
    def run(comm: ThreadComm) -> None:
        walk(comm, _gossip(schedule=GossipSchedule(0.1 * (comm.rank + 1))), 1)

    with pytest.raises(RuntimeError, match=r"ranks disagree on schedule\.p_gossip"):
        run_threads(run, 2)

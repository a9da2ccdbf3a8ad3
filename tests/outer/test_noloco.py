"""NoLoCo: the laws of its outer step, and that nothing waits for all."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import commkit
from commkit.compressors import BlockQuantize, NoCompression, TopK
from commkit.outer import NoLoCo, SyncOptions
from commkit.outer.stability import noloco_bound
from tests.harness import ThreadComm, run_threads
from tests.outer.gossiping import (
    SIZE,
    Point,
    drift,
    exchanges_only,
    spread,
    still,
    walk,
)
from tests.outer.lossy import LossyComm
from tests.outer.problem import Net, assert_same, inner_step, train, weights

OPEN = SyncOptions(final_sync=False)


def _noloco(**knobs: Any) -> Any:
    return functools.partial(NoLoCo, **{"sync_every": 2, "options": OPEN, **knobs})


def _hand_case(comm: ThreadComm, **knobs: Any) -> tuple[float, float]:
    """phi = (0, 2), w = (1, 2), no momentum yet."""
    model = torch.nn.Linear(1, 1, bias=False)
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    with NoLoCo(
        model, inner, sync_every=1, process_group=comm, options=OPEN, alpha=0.5, **knobs
    ) as outer:
        model.weight.data.fill_(2.0 * comm.rank)
        outer.anchors.read()
        model.weight.grad = torch.full((1, 1), -1.0 if comm.rank == 0 else 0.0)
        inner.step()
        state = outer.rank_state_dict()
    momentum = state["own"]["momentum"]["weight"]
    return float(momentum), float(model.weight.detach())


@pytest.mark.parametrize(
    "knobs",
    [
        {"beta": 0.7, "gamma": 0.7},
        {"beta": 0.7, "gamma": 0.7, "compressor": NoCompression()},
        {"beta": 0.7, "gamma": 0.7, "strict": True},
        {"beta": 0.7, "gamma": 0.7, "pairing": "round_robin"},
    ],
)
def test_hand_case(knobs: dict[str, Any]) -> None:
    results = run_threads(functools.partial(_hand_case, **knobs), 2)
    torch.testing.assert_close(torch.tensor(results), torch.tensor([(1.05, 1.05), (-0.35, 1.65)]))


def test_hand_case_of_different_weights() -> None:
    """m_0 = -0.6 * mean(-1, 0) - 0.4 (0 - 1) = 0.7; m_1 = 0.3 - 0.4 = -0.1."""
    results = run_threads(functools.partial(_hand_case, beta=0.6, gamma=0.4), 2)
    torch.testing.assert_close(torch.tensor(results), torch.tensor([(0.7, 0.7), (-0.1, 1.9)]))


@pytest.mark.parametrize("world_size", [2, 5, 6])
@pytest.mark.parametrize("group_size", [2, 3])
def test_the_two_forms_agree(world_size: int, group_size: int) -> None:
    def run(comm: ThreadComm, compressor: Any) -> Tensor:
        return walk(comm, _noloco(compressor=compressor, group_size=group_size), 12)

    fast = run_threads(functools.partial(run, compressor=None), world_size)
    both = run_threads(functools.partial(run, compressor=NoCompression()), world_size)
    for a, b in zip(fast, both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert world_size <= group_size or spread(fast) > 1e-6


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"beta": 0.6, "gamma": 0.9},
        {"wire_dtype": "bf16"},
        {"beta": 0.6, "wire_dtype": "bf16", "gamma": 0.9},
        {"compressor": TopK(density=0.2)},
        {"compressor": BlockQuantize(bits=4, block_size=8)},
        {"strict": True},
        {"pairing": "round_robin"},
        {"group_size": 3},
    ],
)
@pytest.mark.parametrize("world_size", [4, 5])
def test_the_mean_follows_heavy_ball_diloco(knobs: dict[str, Any], world_size: int) -> None:
    """Whatever the wire loses: what one side of a pair does not get, the other does not give."""

    def fixed(rank: int, step: int, model: Point) -> None:
        gradient = torch.linspace(-1, 1, SIZE) * (rank - 1) + 0.3 * step
        model.x.grad, model.y.grad = gradient[:-1].clone(), gradient[-1].clone()

    def run(comm: ThreadComm) -> list[Tensor]:
        seen: list[Tensor] = []
        walk(
            comm,
            _noloco(**knobs),
            20,
            gradient=fixed,
            start=lambda rank: torch.full((SIZE,), float(rank)),
            each=lambda step, model, outer: seen.append(model.vector) if step % 2 else None,
        )
        return seen

    runs = run_threads(run, world_size)
    means = [torch.stack(vectors).double().mean(0) for vectors in zip(*runs, strict=True)]
    phi, momentum = torch.full((SIZE,), (world_size - 1) / 2.0).double(), torch.zeros(SIZE).double()
    for round_number, mean in enumerate(means):
        delta = torch.zeros(SIZE).double()
        for step in (2 * round_number, 2 * round_number + 1):
            for rank in range(world_size):
                delta += 0.1 * (torch.linspace(-1, 1, SIZE) * (rank - 1) + 0.3 * step) / world_size
        momentum = 0.5 * momentum - knobs.get("beta", 0.7) * delta
        phi = phi + momentum
        torch.testing.assert_close(mean, phi, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.5, 0.7), (0.0, 1.0), (0.9, 0.3), (0.3, 1.2)])
def test_replicas_come_together_when_nothing_pulls_them_apart(alpha: float, gamma: float) -> None:
    def run(comm: ThreadComm) -> list[Tensor]:
        seen: list[Tensor] = []
        walk(
            comm,
            _noloco(sync_every=1, alpha=alpha, beta=gamma),
            90,
            gradient=still,
            start=lambda rank: Point(rank).vector,
            each=lambda step, model, outer: seen.append(model.vector),
        )
        return seen

    runs = run_threads(run, 8)
    before = spread([Point(rank).vector for rank in range(8)])
    # Half the rate expected over all pairings, for one draw of them.
    for rounds in (30, 60, 90):
        after = spread([seen[rounds - 1] for seen in runs])
        assert after < _rate(alpha, gamma) ** (rounds / 2) * before + 1e-12


def _rate(alpha: float, gamma: float) -> float:
    """By how much E[x^2] shrinks per round, for many replicas: the largest eigenvalue of the recursion of
    E[m^2], E[m x] and E[x^2] under m <- alpha m + gamma (x_j - x) / 2, x <- x + m."""
    m_squared = [alpha**2, -alpha * gamma, gamma**2 / 2]
    m_times_x = [0, alpha, -gamma / 2]
    moments = torch.tensor(
        [
            m_squared,
            [a + b for a, b in zip(m_squared, m_times_x, strict=True)],
            [a + 2 * b + c for a, b, c in zip(m_squared, m_times_x, (0, 0, 1), strict=True)],
        ]
    )
    return float(torch.linalg.eigvals(moments).abs().max())


def test_the_bound_is_where_the_rate_reaches_one() -> None:
    for alpha in (0.5, 0.7, 0.9):
        assert _rate(alpha, noloco_bound(alpha) * 0.999) < 1
        assert _rate(alpha, 2 * (1 - alpha**2)) == pytest.approx(1, abs=1e-5)


def test_two_without_momentum_average_at_once() -> None:
    def run(comm: ThreadComm) -> Tensor:
        start = torch.arange(SIZE) * (1.0 + comm.rank)
        knobs = {"sync_every": 1, "alpha": 0.0, "beta": 1.0}
        return walk(comm, _noloco(**knobs), 1, gradient=still, start=lambda rank: start)

    for x in run_threads(run, 2):
        torch.testing.assert_close(x, torch.arange(SIZE) * 1.5)


@pytest.mark.parametrize("pairing", ["random", "round_robin"])
@pytest.mark.parametrize("world_size", [1, 2, 5, 8])
def test_partners_are_mutual_and_the_same_everywhere(pairing: Any, world_size: int) -> None:
    model = Point(0)
    methods = [NoLoCo(model, torch.optim.SGD(model.parameters()), pairing=pairing) for _ in "ab"]
    met = set()
    for outer in methods:
        outer.ranks = tuple(range(world_size))
    for round_number in range(80):
        told = [outer.partners(r, round_number) for outer in methods for r in range(world_size)]
        assert told[:world_size] == told[world_size:]
        alone = 0
        for rank, partners in enumerate(told[:world_size]):
            assert len(partners) <= 1
            alone += not partners
            for other in partners:
                assert other != rank
                assert told[other] == [rank]
                met.add((rank, other))
        assert alone == world_size % 2
    assert len(met) == world_size * (world_size - 1)


@pytest.mark.parametrize(
    ("knobs", "per_round"),
    [
        ({}, 4 * SIZE),
        ({"wire_dtype": "bf16"}, 2 * SIZE),
        ({"beta": 0.6, "gamma": 0.7}, 8 * SIZE),
        ({"beta": 0.6, "gamma": 0.7, "wire_dtype": "bf16"}, 4 * SIZE),
        ({"strict": True}, 4 * SIZE + 1),
    ],
)
def test_bytes_are_the_formula_and_no_collective_is_issued(
    knobs: dict[str, Any], per_round: int
) -> None:
    def run(comm: ThreadComm) -> dict[str, int]:
        return walk(comm, _noloco(**knobs), 6, after=lambda model, outer: exchanges_only(outer))

    for counted in run_threads(run, 4):
        assert counted == {"outer/exchange": 3 * per_round}


def test_a_compressor_shortens_the_critical_path() -> None:
    def run(comm: ThreadComm) -> dict[str, int]:
        knobs = {"compressor": commkit.compressors.Sign()}
        return walk(comm, _noloco(**knobs), 6, after=lambda model, outer: exchanges_only(outer))

    for counted in run_threads(run, 2):
        anchors = 3 * 4 * SIZE
        assert anchors < counted["outer/exchange"] <= anchors + 3 * 32


def test_warm_up_averages_gradients_and_ends_equal() -> None:
    def run(comm: ThreadComm) -> Tensor:
        return walk(comm, _noloco(options=SyncOptions(warmup_steps=4, final_sync=False)), 4)

    one, other = run_threads(run, 2)
    assert torch.equal(one, other)


def test_a_merge_at_the_end_makes_all_equal() -> None:
    def run(comm: ThreadComm) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        kept: list[dict[str, Tensor]] = []
        model = Net(comm.rank)
        inner = torch.optim.AdamW(model.parameters(), lr=0.02)
        with NoLoCo(model, inner, sync_every=2, process_group=comm) as outer:
            for step in range(5):
                inner_step(model, inner, comm.rank, step)
            kept.append(weights(model) | dict(model.named_buffers()))
            kept[0] = {name: x.clone() for name, x in kept[0].items()}
            assert outer.consensus_distance() > 0
        return kept[0], weights(model) | dict(model.named_buffers())

    runs = run_threads(run, 3)
    for before, after in runs:
        assert_same(after, runs[0][1])
        assert not torch.equal(before["first.weight"], after["first.weight"])
        for name, x in after.items():
            if x.is_floating_point():
                mean = torch.stack([other[name] for other, _ in runs]).mean(0)
                torch.testing.assert_close(x, mean)
        assert after["norm.num_batches_tracked"] == 5


def test_half_precision_models_are_not_pushed_by_rounding() -> None:
    """Without training, an anchor that bf16 cannot hold stays where it is."""

    def run(comm: ThreadComm) -> Tensor:
        model = Net(0, torch.bfloat16)
        inner = torch.optim.SGD(model.parameters(), lr=0.0)
        with NoLoCo(model, inner, sync_every=1, process_group=comm, options=OPEN) as outer:
            anchor = outer.anchors.values["first.weight"]
            with torch.no_grad():
                anchor.add_(1e-4 * (1 + torch.arange(30).view(6, 5)) / 30)
            before = anchor.clone()
            for name in outer.anchors.values:
                outer.anchors.write_back([name])
            for step in range(3):
                inner_step(model, inner, comm.rank, step)
            return anchor - before

    for moved in run_threads(run, 2):
        assert torch.equal(moved, torch.zeros_like(moved))


@pytest.mark.parametrize("knobs", [{}, {"beta": 0.6, "gamma": 0.7}, {"strict": True}])
def test_a_lost_partner_makes_for_a_step_alone(knobs: dict[str, Any]) -> None:
    def run(comm: ThreadComm) -> tuple[Tensor, int, set[int]]:
        lossy = LossyComm(comm, lambda rank, peer, tag: True)
        return walk(
            lossy,  # type: ignore[arg-type]
            _noloco(**knobs),
            8,
            after=lambda model, outer: (model.vector, outer.peers.missed, outer.peers.lost),
        )

    def alone(comm: ThreadComm) -> Tensor:
        def as_rank(rank: int, step: int, model: Point) -> None:
            drift(1, step, model)

        return walk(comm, _noloco(**knobs), 8, gradient=as_rank)

    _, (x, missed, lost) = run_threads(run, 2)
    assert lost == {0}
    assert missed >= 4
    torch.testing.assert_close(x, run_threads(alone, 1)[0])


def test_strict_mode_uses_all_or_nothing() -> None:
    """A group of three whose ranks 0 and 1 lose each other: rank 2, which hears both, steps alone too."""

    def run(comm: ThreadComm) -> Tensor:
        lossy = LossyComm(comm, lambda rank, peer, tag: {rank, peer} == {0, 1})
        return walk(lossy, _noloco(group_size=3, strict=True), 2)  # type: ignore[arg-type]

    def alone(comm: ThreadComm) -> Tensor:
        return walk(comm, _noloco(), 2, gradient=lambda rank, step, model: drift(2, step, model))

    torch.testing.assert_close(run_threads(run, 3)[2], run_threads(alone, 1)[0])


@pytest.mark.parametrize(
    "knobs", [{}, {"gamma": 0.8}, {"compressor": BlockQuantize(bits=8, block_size=8)}]
)
def test_what_is_not_finite_stays_with_its_rank(knobs: dict[str, Any]) -> None:
    def poison(rank: int, step: int, model: Point) -> None:
        drift(rank, step, model)
        if rank == 1 and step == 3:
            model.x.grad[2] = torch.nan

    def run(comm: ThreadComm) -> tuple[Tensor, Any, bool]:
        resets: list[bool] = []
        return walk(
            comm,
            _noloco(**knobs),
            8,
            gradient=poison,
            each=lambda step, model, outer: resets.append(outer.was_reset),
            after=lambda model, outer: (model.vector, dict(outer.peers.suspects), resets[3]),
        )

    results = run_threads(run, 4)
    suspected = [suspects for _, suspects, _ in results]
    assert sum(suspects.get(1, 0) for suspects in suspected) == 1
    assert [reset for _, _, reset in results] == [False, True, False, False]
    assert all(bool(x.isfinite().all()) for x, _, _ in results)


def test_gamma_beyond_the_bound_is_refused_with_the_bound() -> None:
    model = Point(0)
    inner = torch.optim.SGD(model.parameters())
    bound = noloco_bound(0.9)
    with pytest.raises(ValueError, match=rf"gamma=0.7 .* below {bound:.4g} for alpha=0.9"):
        NoLoCo(model, inner, alpha=0.9)
    NoLoCo(model, inner, alpha=0.9, gamma=bound * 0.99)
    for knobs, message in (
        ({"beta": 0.0}, "beta=0.0 must be > 0"),
        ({"group_size": 1}, "group_size=1"),
        ({"pairing": "ring"}, "pairing='ring'"),
        ({"pairing": "round_robin", "group_size": 3}, "makes pairs"),
        ({"wire_dtype": "fp16"}, "wire_dtype='fp16'"),
        ({"sync_every": 0}, "sync_every=0"),
        ({"options": SyncOptions(inner_state="average")}, "takes a collective"),
    ):
        with pytest.raises(ValueError, match=message):
            NoLoCo(model, inner, **knobs)  # type: ignore[arg-type]


def test_an_odd_rank_out_takes_part_in_later_rounds() -> None:
    def run(comm: ThreadComm) -> Tensor:
        return train(comm, functools.partial(NoLoCo, sync_every=2), 12)[0].first.weight.detach()  # type: ignore[union-attr, return-value]

    one, *others = run_threads(run, 3)
    for other in others:
        assert torch.equal(one, other)

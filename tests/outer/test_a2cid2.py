"""A2CiD2 in rounds: equal to its recurrence, and ahead of plain pair averages on a ring."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from commkit.outer import A2CiD2, SyncOptions
from commkit.outer.acid import AD_PSGD, AcidCoefficients
from commkit.outer.matching import draw_pairs, meeting_rates
from commkit.outer.topologies import OnePeerExponential, RandomPairs, Ring, RoundRobin, Topology
from tests.harness import ThreadComm, run_threads
from tests.outer.gossiping import SIZE, Point, drift, exchanges_only, spread, still, walk
from tests.outer.lossy import LossyComm

OPEN = SyncOptions(final_sync=False)


def _acid(**knobs: Any) -> Any:
    return functools.partial(A2CiD2, **{"options": OPEN, **knobs})


def _copies(outer: Any) -> Tensor:
    return torch.cat([copy.reshape(-1) for copy in outer.acid.copies])


def _trace(
    comm: Any, steps: int, gradient: Any = drift, **knobs: Any
) -> list[tuple[Tensor, Tensor]]:
    seen: list[tuple[Tensor, Tensor]] = []

    def start(rank: int) -> Tensor:
        return Point(rank).vector

    model = Point(comm.rank)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with _acid(**knobs)(model, inner, process_group=comm) as outer:
        model.vector = start(comm.rank)
        for copy, x in zip(outer.acid.copies, outer.acid.params, strict=True):
            copy.copy_(x)
        for step in range(steps):
            gradient(comm.rank, step, model)
            inner.step()
            seen.append((model.vector, _copies(outer)))
    return seen


@pytest.mark.parametrize("sync_every", [1, 2])
def test_the_recurrence(sync_every: int) -> None:
    runs = run_threads(functools.partial(_trace, steps=8, sync_every=sync_every, seed=5), 5)
    mixing = Ring().mixing(5)
    acid = AcidCoefficients.of(meeting_rates(mixing, 5) / sync_every)
    x = torch.stack([Point(rank).vector for rank in range(5)]).double().numpy()
    y = x.copy()
    e = np.exp(-2 * acid.eta)
    for step in range(8):
        targets = np.stack([np.linspace(-1, 1, SIZE) * (r + 1) + 0.1 * step for r in range(5)])
        d = 0.1 * (x - targets)
        x, y = (1 + e) / 2 * x + (1 - e) / 2 * y - d, (1 - e) / 2 * x + (1 + e) / 2 * y - d
        if (step + 1) % sync_every == 0:
            before = x.copy()
            for i, j in draw_pairs(mixing, 5, step // sync_every).items():
                x[i] -= (before[i] - before[j]) / 2
                y[i] -= acid.alpha * (before[i] - before[j])
        got_x = torch.stack([seen[step][0] for seen in runs]).double().numpy()
        got_y = torch.stack([seen[step][1] for seen in runs]).double().numpy()
        np.testing.assert_allclose(got_x, x, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got_y, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wire_dtype", ["fp32", "bf16"])
def test_the_sum_of_both_copies_is_conserved(wire_dtype: str) -> None:
    run = functools.partial(_trace, steps=60, gradient=still, wire_dtype=wire_dtype)
    runs = run_threads(run, 4)
    total = 2 * torch.stack([Point(rank).vector for rank in range(4)]).double().sum(0)
    for at in (0, 9, 59):
        now = torch.stack([x.double() + y.double() for x, y in (seen[at] for seen in runs)]).sum(0)
        torch.testing.assert_close(now, total, rtol=0, atol=2e-5)


def test_it_agrees_faster_than_pair_averages_on_a_ring() -> None:
    steps, n = 60, 8
    after = {}
    for name, coefficients in (("acid", None), ("plain", AD_PSGD)):
        run = functools.partial(_trace, steps=steps, gradient=still, coefficients=coefficients)
        after[name] = spread([seen[-1][0] for seen in run_threads(run, n)])
    assert after["acid"] < after["plain"] / 3


def test_without_momentum_it_is_pair_averages() -> None:
    run = functools.partial(
        _trace, steps=3, gradient=still, coefficients=AD_PSGD, topology=RoundRobin()
    )
    runs = run_threads(run, 4)
    x = torch.stack([Point(rank).vector for rank in range(4)]).double().numpy()
    for step in range(3):
        x = RoundRobin().mixing(4).matrix(step) @ x
    got = torch.stack([seen[-1][0] for seen in runs]).double().numpy()
    np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "topology", [Ring(), RoundRobin(), RandomPairs()], ids=lambda t: type(t).__name__
)
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pairs_are_mutual_links_of_the_round(topology: Topology, n: int) -> None:
    mixing = topology.mixing(n)
    for r in range(30):
        pairs = draw_pairs(mixing, 7, r)
        matrix = mixing.matrix(r)
        assert all(pairs[j] == i and matrix[i, j] > 0 for i, j in pairs.items())
        free = set(range(n)) - set(pairs)
        assert all(matrix[i, j] == 0 for i in free for j in free - {i})


def test_rates_of_a_ring_are_even() -> None:
    rates = meeting_rates(Ring().mixing(6), 0)
    on_links = [rates[i, (i + 1) % 6] for i in range(6)]
    assert rates.sum() == pytest.approx(2 * sum(on_links))
    assert max(on_links) - min(on_links) < 0.08


@pytest.mark.parametrize(("wire_dtype", "width"), [("fp32", 4), ("bf16", 2)])
def test_a_meeting_sends_the_parameters_once(wire_dtype: str, width: int) -> None:
    def run(comm: ThreadComm) -> dict[str, int]:
        method = _acid(topology=RandomPairs(), wire_dtype=wire_dtype)
        return walk(comm, method, 5, after=lambda model, outer: exchanges_only(outer))

    for counted in run_threads(run, 4):
        assert counted == {"outer/exchange": 5 * SIZE * width}


def test_lost_partners_and_what_is_not_finite() -> None:
    def poison(rank: int, step: int, model: Point) -> None:
        drift(rank, step, model)
        if rank == 0 and step == 4:
            model.x.grad = torch.full_like(model.x, torch.nan)

    def run(comm: ThreadComm) -> list[tuple[Tensor, Tensor]]:
        lossy = LossyComm(comm, lambda rank, peer, tag: {rank, peer} == {2, 3})
        return _trace(lossy, 30, gradient=poison, topology=RandomPairs())

    for seen in run_threads(run, 4):
        assert bool(seen[-1][0].isfinite().all())
        assert bool(seen[-1][1].isfinite().all())


def test_a_merge_ends_with_equal_weights_and_copies() -> None:
    def run(comm: ThreadComm) -> tuple[Tensor, Tensor]:
        box: list[Any] = []
        x = walk(comm, A2CiD2, 5, each=lambda step, model, outer: box.append(outer))
        return x, _copies(box[0])

    results = run_threads(run, 3)
    for x, y in results:
        assert torch.equal(x, results[0][0])
        assert torch.equal(x, y)


def test_a_step_that_the_optimizer_does_not_see_lets_time_pass() -> None:
    def run(comm: ThreadComm) -> tuple[Tensor, float]:
        def pass_time(model: Point, outer: Any) -> tuple[Tensor, float]:
            for copy in outer.acid.copies:
                copy.add_(1.0)
            for _ in range(3):
                outer.after_step()
            return _copies(outer) - model.vector, float(outer.acid.coefficients.eta)

        return walk(comm, _acid(sync_every=100), 0, after=pass_time)

    for apart, eta in run_threads(run, 3):
        assert eta > 0
        torch.testing.assert_close(apart, torch.full((SIZE,), float(np.exp(-6 * eta))))


def test_one_way_links_are_refused() -> None:
    with pytest.raises(ValueError, match="a meeting takes two"):
        run_threads(lambda comm: walk(comm, _acid(topology=OnePeerExponential()), 1), 4)

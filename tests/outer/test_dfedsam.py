"""Laws of DFedSAM, of the schemes that are gossip with settings of their own, and of steps with a closure."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from commkit.config import ConfigError
from commkit.outer import DFedSAM, DiLoCo, GossipSGD, LocalSGD, MoNNA, OuterSync, SyncOptions
from commkit.outer.topologies import OnePeerExponential, Ring, StaticExponential
from commkit.schemes import make_reducer, make_scheme
from commkit.sim import ThreadComm, run_threads
from tests.outer.gossiping import SIZE, Point
from tests.outer.problem import Net, assert_same, batch, weights

APART = SyncOptions(final_sync=False)
CURVATURES = torch.linspace(1, 9, SIZE)


def target_of(rank: int) -> Tensor:
    return torch.linspace(-1, 1, SIZE) * (rank + 1)


def gradient_at(x: Tensor, rank: int) -> Tensor:
    return CURVATURES * (x - target_of(rank))


def quadratic(comm: ThreadComm, make: Callable[..., OuterSync], steps: int) -> Tensor:
    model = Point(comm.rank)
    inner = torch.optim.SGD(model.parameters(), lr=0.01)

    def closure() -> Tensor:
        inner.zero_grad()
        x = torch.cat([model.x, model.y.view(1)])
        loss = (CURVATURES * (x - target_of(comm.rank)).square()).sum() / 2
        loss.backward()
        return loss.detach()

    with make(model, inner, process_group=comm):
        for _ in range(steps):
            loss = inner.step(closure)  # type: ignore[arg-type]
            assert torch.is_tensor(loss)
    return model.vector


@pytest.mark.parametrize("topology", [Ring(), StaticExponential()], ids=["ring", "exponential"])
def test_local_steps_look_uphill_and_rounds_are_a_power_of_the_matrix(topology: Any) -> None:
    n, steps, every, rho, q = 5, 6, 3, 0.05, 4
    make = functools.partial(
        DFedSAM, sync_every=every, rho=rho, gossip_steps=q, topology=topology, options=APART
    )
    xs = torch.stack(run_threads(functools.partial(quadratic, make=make, steps=steps), n))
    expected = Point(0).vector.repeat(n, 1)  # rank 0's at the start
    power = torch.from_numpy(np.linalg.matrix_power(topology.matrix(n, 0), q)).float()
    for step in range(steps):
        for rank in range(n):
            g = gradient_at(expected[rank], rank)
            uphill = expected[rank] + rho * g / g.norm()
            expected[rank] -= 0.01 * gradient_at(uphill, rank)
        if (step + 1) % every == 0:
            expected = power @ expected
    torch.testing.assert_close(xs, expected, rtol=1e-5, atol=1e-5)


def test_log_n_steps_on_the_one_peer_graph_are_the_exact_mean() -> None:
    make = functools.partial(
        DFedSAM, sync_every=5, gossip_steps=3, topology=OnePeerExponential(), options=APART
    )
    xs = run_threads(functools.partial(quadratic, make=make, steps=5), 8)
    for x in xs[1:]:
        torch.testing.assert_close(x, xs[0], rtol=1e-5, atol=1e-6)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02)


def learn(
    comm: ThreadComm,
    make: Callable[..., OuterSync],
    with_closure: bool,
    steps: int = 12,
    spoil: int | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = adamw,
) -> tuple[dict[str, Tensor], OuterSync]:
    model = Net(comm.rank)
    inner = optimizer(model.parameters())

    def closure(step: int) -> Tensor:
        x, y = batch(comm.rank, step)
        inner.zero_grad()
        loss = F.mse_loss(model(x), y * (float("nan") if step == spoil and comm.rank == 1 else 1))
        loss.backward()
        return loss

    with make(model, inner, process_group=comm) as outer:
        for step in range(steps):
            if with_closure:
                inner.step(functools.partial(closure, step))
            else:
                closure(step)
                inner.step()
    return weights(model), outer


def test_without_a_radius_it_is_gossip() -> None:
    knobs = {"sync_every": 2, "topology": Ring(), "gossip_steps": 2}
    flat = functools.partial(DFedSAM, rho=0.0, **knobs)
    plain = functools.partial(GossipSGD, **knobs)
    expected = run_threads(functools.partial(learn, make=plain, with_closure=False), 3)
    for with_closure in (True, False):
        mine = run_threads(functools.partial(learn, make=flat, with_closure=with_closure), 3)
        for (a, _), (b, _) in zip(mine, expected, strict=True):
            assert_same(a, b)


def test_a_step_that_is_not_finite_is_left_out_on_its_replica() -> None:
    make = functools.partial(DFedSAM, sync_every=3, topology=Ring())
    results = run_threads(functools.partial(learn, make=make, with_closure=True, spoil=4), 3)
    assert [outer.skipped_steps for _, outer in results] == [0, 1, 0]
    for state, outer in results:
        assert outer.step == 12  # it counts all the same: replicas meet after the same step
        assert_same(state, results[0][0])
        assert all(bool(x.isfinite().all()) for x in state.values())


def test_what_is_refused() -> None:
    model = Net(0)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    for rho in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"rho={rho} must be >= 0 and finite"):
            DFedSAM(model, inner, rho=rho)

    def body(comm: ThreadComm) -> None:
        with DFedSAM(model, inner, process_group=comm, options=APART):
            with pytest.raises(ValueError, match=r"call optimizer.step\(closure\)"):
                inner.step()

    run_threads(body, 1)


# Steps with a closure, of any method.

METHODS: dict[str, Any] = {
    "diloco": functools.partial(DiLoCo, sync_every=3, options=SyncOptions(warmup_steps=4)),
    "local_sgd": functools.partial(LocalSGD, sync_every=3),
    "gossip": functools.partial(GossipSGD, options=SyncOptions(warmup_steps=2)),
    "monna": functools.partial(MoNNA, num_faulty=0, sync_every=2),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_closure_changes_nothing(name: str) -> None:
    """Gradients of the warm-up are averaged, and momenta formed, after it has run."""
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    run = functools.partial(learn, make=METHODS[name], optimizer=sgd)
    expected = run_threads(functools.partial(run, with_closure=False), 3)
    for (a, _), (b, _) in zip(
        run_threads(functools.partial(run, with_closure=True), 3), expected, strict=True
    ):
        assert_same(a, b)


def test_an_optimizer_that_evaluates_often_counts_one_step() -> None:
    make = functools.partial(DiLoCo, sync_every=2, options=SyncOptions(warmup_steps=2))
    lbfgs = functools.partial(torch.optim.LBFGS, lr=0.1, max_iter=4)
    run = functools.partial(learn, make=make, with_closure=True, steps=4, optimizer=lbfgs)
    (one, outer), (other, _) = run_threads(run, 2)
    assert outer.step == 4
    assert_same(one, other)


# Schemes that are a method with settings of their own.


def _final(block: dict[str, Any], steps: int = 9) -> list[dict[str, Tensor]]:
    def body(comm: ThreadComm) -> dict[str, Tensor]:
        return learn(comm, make_scheme(block), with_closure=False, steps=steps)[0]  # type: ignore

    return run_threads(body, 3)


def test_post_local_sgd_is_local_sgd_after_its_switch() -> None:
    mine = _final({"name": "post_local_sgd", "switch_step": 4, "sync_every": 3})
    local = {"name": "local_sgd", "sync_every": 3, "options": {"warmup_steps": 4}}
    for a, b in zip(mine, _final(local), strict=True):
        assert_same(a, b)


def test_post_local_sgd_averages_gradients_before_its_switch() -> None:
    """As local SGD of one-step rounds does; then replicas part."""
    steps = {"name": "post_local_sgd", "switch_step": 5, "options": {"final_sync": False}}
    before = _final(steps, steps=5)
    for state in before[1:]:
        assert_same(state, before[0])
    after = _final(steps, steps=6)
    assert any(not torch.equal(after[0][name], after[1][name]) for name in after[0])


def test_single_merge_meets_now_and_then_and_ends_in_one_mean() -> None:
    block = {"name": "single_merge", "windows": [[0, 4, "none"], [6, 9, "merge"]]}
    scheme = make_scheme(block)
    schedule = scheme.knobs["schedule"]  # type: ignore[union-attr]
    assert (schedule.p_gossip, schedule.windows) == (0.2, ((0, 4, "none"), (6, 9, "merge")))
    results = _final(block)
    for state in results[1:]:
        assert_same(state, results[0])


def test_silent_until_the_merge_it_is_training_alone() -> None:
    block = {"name": "single_merge", "p_gossip": 0.0}

    def alone(comm: ThreadComm) -> list[dict[str, Tensor]]:
        states = []
        for rank in range(3):
            model = Net(0)
            inner = torch.optim.AdamW(model.parameters(), lr=0.02)
            for step in range(9):
                x, y = batch(rank, step)
                inner.zero_grad()
                F.mse_loss(model(x), y).backward()
                inner.step()
            states.append(weights(model))
        return states

    (states,) = run_threads(alone, 1)
    for mine in _final(block):
        for name, x in mine.items():
            mean = torch.stack([state[name] for state in states]).mean(0)
            torch.testing.assert_close(x, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"name": "post_local_sgd"}, "scheme.switch_step is missing"),
        ({"name": "post_local_sgd", "switch_step": -1}, "switch_step=-1 must be >= 0"),
        (
            {"name": "post_local_sgd", "switch_step": 5, "options": {"warmup_steps": 3}},
            "options.warmup_steps=3 and switch_step=5 say the same thing; give switch_step alone",
        ),
        ({"name": "single_merge", "p_gossip": 1.5}, r"p_gossip=1.5 must be in \[0, 1\]"),
        ({"name": "single_merge", "windows": [[3, 1, "none"]]}, r"windows: \[3, 1, 'none'\]"),
        (
            {"name": "single_merge", "options": {"final_sync": False}},
            "leaves out the merge that single_merge is about",
        ),
        ({"name": "compose", "aggregator": None}, "scheme.aggregator is null; give it a name"),
        ({"name": "dfedsam_mgs", "rho": -1.0}, "rho=-1.0 must be >= 0"),
        ({"name": "dfedsam_mgs", "gossip_steps": 0}, "gossip_steps=0 must be from 1 to 32"),
        ({"name": "dadao"}, r"call commkit.outer.Dadao\(.*or use a2cid2"),
        ({"name": "async_local_sgd", "servers": []}, r"servers=\(\) must be one or more"),
        ({"name": "async_local_sgd", "sync_every": 0}, "sync_every=0 must be >= 1"),
        (
            {"name": "async_local_sgd", "rule": {"name": "delayed_nesterov", "momentum": 1.0}},
            r"scheme.rule: momentum=1.0 must be in \[0, 1\)",
        ),
        ({"name": "gossip_sgd"}, "unknown scheme 'gossip_sgd', did you mean 'gossip'"),
    ],
)
def test_bad_blocks(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_scheme(block)


def test_asynchronous_schemes_have_roles() -> None:
    with pytest.raises(TypeError, match="has servers and workers, it reduces no gradients"):
        make_reducer("async_local_sgd")
    block = {"name": "async_local_sgd", "servers": [1], "seed": 7, "compressor": None}
    made = make_scheme(block)
    assert (made.options.servers, made.options.seed) == ((1,), 7)  # type: ignore[union-attr]
    assert [made.serves(rank) for rank in range(2)] == [False, True]  # type: ignore[union-attr]

"""EControl: its recursion and the identities of the paper."""

from __future__ import annotations

import pytest
import torch

from commkit import registry
from commkit.feedback import EF21, EControl
from commkit.policy import Policy
from commkit.schemes import make_reducer
from commkit.sim import ThreadComm, run_threads
from commkit.types import Feedback

from .runs import N, constant, gradient, reducer, run

EXACT = {"rtol": 1e-11, "atol": 1e-11}  # float64, sums of 40 steps of size 10
E, OWN, MEAN = "rank/w", "rank/own_estimate::w", "rank/mean_estimate::w"
every_world = pytest.mark.parametrize("world_size", [1, 2, 3])


def test_it_is_registered_and_a_feedback() -> None:
    assert "econtrol" in registry.names("feedback")
    assert isinstance(EControl(), Feedback)


@every_world
@pytest.mark.parametrize("eta", [0.0, 0.025, 1.0])
def test_the_recursion(world_size: int, eta: float) -> None:
    ranks = run(lambda: reducer(EControl(eta)), world_size, 12)
    h = torch.zeros(N, dtype=torch.float64)
    own, e = ([torch.zeros(N, dtype=torch.float64) for _ in ranks] for _ in range(2))
    for step in range(12):
        for rank in range(world_size):
            g = gradient(rank, step)
            c = eta * e[rank] + g - own[rank]
            c[c.abs().sort().indices[: N - N // 10]] = 0
            c = c.float().double()  # the wire
            e[rank] = e[rank] + g - own[rank] - c
            own[rank] = own[rank] + c
            h = h + c / world_size
        for rank, seen in enumerate(ranks):
            out, state = seen[step]
            torch.testing.assert_close(out, h, **EXACT)
            torch.testing.assert_close(state[E], e[rank], **EXACT)
            torch.testing.assert_close(state[OWN], own[rank], **EXACT)
            torch.testing.assert_close(state[MEAN], h, **EXACT)


@every_world
def test_the_estimate_is_the_mean_of_the_estimates(world_size: int) -> None:
    ranks = run(lambda: reducer(EControl()), world_size, 40)
    for step in range(40):
        mean = sum(seen[step][1][OWN] for seen in ranks) / world_size
        for seen in ranks:
            assert torch.equal(seen[step][0], ranks[0][step][0])
            torch.testing.assert_close(seen[step][0], mean, **EXACT)


@every_world
def test_gradients_less_results_are_the_mean_error(world_size: int) -> None:
    """So that x - lr * mean e follows gradient descent exactly."""
    ranks = run(lambda: reducer(EControl(0.1)), world_size, 40)
    put = sum(gradient(r, s) for r in range(world_size) for s in range(40)) / world_size
    got = sum(out for out, _ in ranks[0])
    left = sum(seen[-1][1][E] for seen in ranks) / world_size
    torch.testing.assert_close(put - got, left, **EXACT)


def test_sending_everything_gives_the_mean_gradient_and_no_error() -> None:
    for seen in run(lambda: reducer(EControl(0.3), 1.0), 2, 6):
        for step, (out, state) in enumerate(seen):
            mean = (gradient(0, step) + gradient(1, step)) / 2
            # differences below 16 travel as float32, and what that cuts off adds up over steps
            atol = 2**-24 * 16 * (step + 1)
            torch.testing.assert_close(out, mean, rtol=0, atol=atol)
            assert float(state[E].abs().max()) <= atol


def test_an_old_error_goes_away_at_the_set_rate_if_everything_is_sent() -> None:
    """C = identity: h_i = g_i + eta e_i, e_i = (1 - eta) e_i."""
    eta = 0.25

    def body(comm: ThreadComm) -> None:
        at_work = reducer(EControl(eta), 1.0)
        error = gradient(comm.rank, 77)
        at_work.feedback.load_state_dict({"w": error})
        for step in range(4):
            out = at_work.reduce({"w": gradient(comm.rank, step)}, comm)["w"]
            at_work.end_step()
            mean = sum(
                gradient(r, step) + eta * (1 - eta) ** step * gradient(r, 77) for r in range(2)
            )
            torch.testing.assert_close(out, mean / 2, rtol=0, atol=2**-24 * 64)
            left = at_work.state_dict()[E]
            expected = (1 - eta) ** (step + 1) * error
            torch.testing.assert_close(left, expected, rtol=0, atol=2**-24 * 64)

    run_threads(body, 2)


def test_without_the_error_it_is_ef21() -> None:
    mine, theirs = (run(lambda f=f: reducer(f()), 2, 20) for f in (lambda: EControl(0.0), EF21))
    for a, b in zip(mine[0], theirs[0], strict=True):
        assert torch.equal(a[0], b[0])


def test_without_an_estimate_and_at_full_strength_it_is_error_feedback() -> None:
    """h = 0, eta = 1: the first step."""
    (first, state), *_ = run(lambda: reducer(EControl(1.0)), 1, 1)[0]
    assert torch.equal(state[E] + first, gradient(0, 0))


@pytest.mark.parametrize("eta", [0.0025, 0.025, 0.1])
def test_under_a_constant_gradient_the_estimate_converges_and_the_error_stays(eta: float) -> None:
    seen = run(lambda: reducer(EControl(eta)), 2, 600, constant)[0]
    mean = (constant(0, 0) + constant(1, 0)) / 2
    off = [float((out - mean).norm() / mean.norm()) for out, _ in seen]
    errors = [float(state[E].norm()) for _, state in seen]
    assert max(off[300:]) < max(off[:20])
    assert max(errors[300:]) <= max(errors[:300])
    if eta >= 0.025:
        assert off[-1] < 1e-3 * off[0]


def test_memory_is_twelve_bytes_per_element() -> None:
    seen = run(lambda: reducer(EControl()), 2, 3, lambda r, s: gradient(r, s).float())
    state = seen[0][-1][1]
    assert sum(x.numel() * x.element_size() for x in state.values()) == 12 * N


def test_a_bad_step_leaves_no_trace() -> None:
    def body(comm: ThreadComm) -> None:
        at_work = reducer(EControl())
        for step in range(4):
            before = {k: x.clone() for k, x in at_work.feedback.state_dict().items()}
            g = gradient(comm.rank, step)
            if step in (0, 2) and comm.rank == 1:
                g[5] = -torch.inf
            at_work.reduce({"w": g}, comm)
            assert at_work.end_step().nonfinite == (step in (0, 2))
            after = at_work.feedback.state_dict()
            changed = before.keys() != after.keys() or any(
                not torch.equal(before[k], after[k]) for k in before
            )
            assert changed == (step in (1, 3))

    run_threads(body, 2)


def test_dense_again_it_pays_what_it_owes() -> None:
    def body(comm: ThreadComm) -> torch.Tensor:
        at_work, total = reducer(EControl(0.1)), torch.zeros(N, dtype=torch.float64)
        for step in range(6):
            if step == 5:
                at_work.policy = Policy(start_step=10**9)
            total += at_work.reduce({"w": gradient(comm.rank, step)}, comm)["w"]
            at_work.end_step()
        assert at_work.feedback.state_dict() == {}
        return total

    put = sum(gradient(r, s) for r in range(2) for s in range(6)) / 2
    for total in run_threads(body, 2):
        torch.testing.assert_close(total, put, **EXACT)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_refused(eta: float) -> None:
    with pytest.raises(ValueError, match=rf"eta={eta} must be in \[0, 1\]"):
        EControl(eta)


def test_the_scheme_is_critically_damped_by_itself() -> None:
    for knobs, eta in (({}, 0.025), ({"density": 0.04}, 0.01), ({"eta": 0.5}, 0.5)):
        feedback = make_reducer({"name": "econtrol", **knobs}).feedback
        assert isinstance(feedback, EControl)
        assert feedback.eta == pytest.approx(eta)


@pytest.mark.parametrize("scheme", ["ef21", "econtrol"])
def test_a_rank_that_no_longer_uses_a_parameter_is_followed(scheme: str) -> None:
    """Its gradient is zero from now on; an estimate that waited would push others for ever."""

    def body(comm: ThreadComm) -> torch.Tensor:
        at_work = make_reducer({"name": scheme, "density": 0.2, "min_numel": 0})
        out = torch.empty(0)
        for step in range(200):
            unused = comm.rank == 1 and step > 0
            g = torch.zeros(N, dtype=torch.float64) if unused else constant(comm.rank, 0)
            out = at_work.reduce({"w": g}, comm, hold={"w"} if unused else ())["w"]
            at_work.end_step()
        return out

    for out in run_threads(body, 2):
        # both converge linearly, e^-20 and faster after 200 steps; values travel as float32
        torch.testing.assert_close(out, constant(0, 0) / 2, rtol=0, atol=1e-4)

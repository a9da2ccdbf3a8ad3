"""EF21: estimates of gradients, and what their differences give."""

from __future__ import annotations

import pytest
import torch

from commkit import registry
from commkit.feedback import EF21
from commkit.policy import Policy
from commkit.sim import ThreadComm, run_threads
from commkit.types import Feedback

from .runs import N, constant, gradient, reducer, run

EXACT = {"rtol": 1e-12, "atol": 1e-12}
OWN, MEAN, AVERAGE = (f"rank/{what}::w" for what in ("own_estimate", "mean_estimate", "average"))


def test_it_is_registered_and_a_feedback() -> None:
    assert "ef21" in registry.names("feedback")
    assert isinstance(EF21(), Feedback)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("momentum", [1.0, 0.3])
def test_the_recursion(world_size: int, momentum: float) -> None:
    """c = C(v - h_i); h_i = h_i + c; h = h + mean c; the optimizer gets the new h."""
    ranks = run(lambda: reducer(EF21(momentum)), world_size, 12)
    h = torch.zeros(N, dtype=torch.float64)
    own = [torch.zeros(N, dtype=torch.float64) for _ in ranks]
    v = [torch.zeros(N, dtype=torch.float64) for _ in ranks]
    for step in range(12):
        for rank in range(world_size):
            g = gradient(rank, step)
            v[rank] = g if step == 0 else (1 - momentum) * v[rank] + momentum * g
            c = v[rank] - own[rank]
            c[c.abs().sort().indices[: N - N // 10]] = 0
            c = c.float().double()  # the wire
            own[rank] = own[rank] + c
            h = h + c / world_size
        for rank, seen in enumerate(ranks):
            out, state = seen[step]
            torch.testing.assert_close(out, h, **EXACT)
            torch.testing.assert_close(state[OWN], own[rank], **EXACT)
            torch.testing.assert_close(state[MEAN], h, **EXACT)
            assert (AVERAGE in state) == (momentum < 1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_estimate_is_the_mean_of_the_estimates(world_size: int) -> None:
    ranks = run(lambda: reducer(EF21()), world_size, 30)
    for step in range(30):
        mean = sum(seen[step][1][OWN] for seen in ranks) / world_size
        for seen in ranks:
            assert torch.equal(seen[step][0], ranks[0][step][0])
            torch.testing.assert_close(seen[step][0], mean, **EXACT)


def test_under_a_constant_gradient_the_estimate_converges_linearly() -> None:
    """|g - h|^2 <= (1 - density)^t |g|^2, the contraction of top-k."""
    density = 0.1
    for rank, seen in enumerate(run(lambda: reducer(EF21(), density), 2, 40, constant)):
        g = constant(rank, 0)
        for step, (_, state) in enumerate(seen):
            left = float((g - state[OWN]).norm() / g.norm())
            # float32 on the wire
            assert left**2 <= (1 - density) ** (step + 1) + 1e-12


def test_sending_everything_gives_the_mean_gradient() -> None:
    for seen in run(lambda: reducer(EF21(), 1.0), 2, 5):
        for step, (out, _) in enumerate(seen):
            mean = (gradient(0, step) + gradient(1, step)) / 2
            # differences below 16 travel as float32
            torch.testing.assert_close(out, mean, rtol=0, atol=2**-24 * 16)


def test_memory() -> None:
    """8 bytes per element, 12 with momentum."""
    for momentum, size in ((1.0, 8), (0.1, 12)):
        seen = run(lambda m=momentum: reducer(EF21(m)), 2, 3, lambda r, s: gradient(r, s).float())
        state = seen[0][-1][1]
        assert sum(x.numel() * x.element_size() for x in state.values()) == size * N


@pytest.mark.parametrize("momentum", [1.0, 0.1])
def test_a_bad_step_leaves_no_trace(momentum: float) -> None:
    def body(comm: ThreadComm) -> None:
        at_work = reducer(EF21(momentum))
        for step in range(4):
            before = {k: x.clone() for k, x in at_work.feedback.state_dict().items()}
            g = gradient(comm.rank, step)
            if step in (0, 2) and comm.rank == 1:
                g[5] = torch.nan
            at_work.reduce({"w": g}, comm)
            assert at_work.end_step().nonfinite == (step in (0, 2))
            after = at_work.feedback.state_dict()
            changed = before.keys() != after.keys() or any(
                not torch.equal(before[k], after[k]) for k in before
            )
            assert changed == (step in (1, 3))

    run_threads(body, 2)


def test_dense_again_it_forgets() -> None:
    """The estimate stood in for a gradient that is now sent itself: nothing is owed."""

    def body(comm: ThreadComm) -> None:
        at_work = reducer(EF21(0.5))
        at_work.reduce({"w": gradient(comm.rank, 0)}, comm)
        at_work.end_step()
        at_work.policy = Policy(start_step=10**9)
        out = at_work.reduce({"w": gradient(comm.rank, 1)}, comm)["w"]
        at_work.end_step()
        assert torch.equal(out, gradient(0, 1) / 2 + gradient(1, 1) / 2)
        assert at_work.feedback.state_dict() == {}
        assert at_work.feedback.norm() == 0.0

    run_threads(body, 2)


@pytest.mark.parametrize("momentum", [0.0, -0.1, 1.1, float("nan")])
def test_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match=rf"momentum={momentum} must be in \(0, 1\]"):
        EF21(momentum)


def test_another_feedbacks_state_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'velocity::w' belongs to another feedback"):
        EF21().load_state_dict({"velocity::w": torch.zeros(3)})

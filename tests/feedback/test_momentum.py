"""Momentum: a running mean of gradients, staged, of which nothing is subtracted."""

from __future__ import annotations

import pytest
import torch

from commkit.feedback import Momentum
from commkit.schemes import make_reducer
from commkit.sim import ThreadComm, run_threads
from commkit.types import Feedback


def step(feedback: Momentum, x: torch.Tensor, ok: bool = True) -> torch.Tensor:
    """The momentum that is sent."""
    sent = feedback.compensate(x, "w")
    feedback.update(sent, torch.full_like(sent, 100.0), "w")
    feedback.commit(ok)
    return sent.clone()


def test_it_is_a_feedback() -> None:
    assert isinstance(Momentum(), Feedback)


def test_the_recursion_whatever_was_sent() -> None:
    feedback, expected = Momentum(0.75), torch.zeros(3)
    for k in range(5):
        x = torch.tensor([1.0, -2.0, 0.0]) * k
        expected = 0.75 * expected + 0.25 * x
        torch.testing.assert_close(step(feedback, x), expected)


def test_a_constant_gradient_is_approached_without_bias_in_scale() -> None:
    feedback = Momentum(0.9)
    for _ in range(200):
        sent = step(feedback, torch.tensor([3.0]))
    # what is missing is 0.9^200
    assert sent.item() == pytest.approx(3.0, rel=1e-5)


def test_a_dropped_step_leaves_no_trace() -> None:
    feedback = Momentum()
    step(feedback, torch.ones(3))
    before = feedback.state_dict()["w"].clone()
    step(feedback, torch.full((3,), torch.nan), ok=False)
    assert torch.equal(feedback.state_dict()["w"], before)


def test_nothing_is_unsent() -> None:
    feedback = Momentum()
    step(feedback, torch.ones(3))
    assert not feedback.holds("w")
    assert feedback.norm() == 0.0


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, 4), (torch.float32, 4), (torch.float64, 8)], ids=str
)
def test_memory_is_four_bytes_per_element(dtype: torch.dtype, size: int) -> None:
    feedback, x = Momentum(), torch.ones(10, 100, dtype=dtype)
    for _ in range(3):
        step(feedback, x)
    (momentum,) = feedback.state_dict().values()
    assert momentum.untyped_storage().nbytes() == 1000 * size
    assert bool((x == 1).all()), "the gradient is not touched"


def test_state_round_trip_copies() -> None:
    first, second = Momentum(), Momentum()
    step(first, torch.ones(3))
    state = first.state_dict()
    second.load_state_dict(state)
    assert torch.equal(step(second, torch.ones(3)), step(first, torch.ones(3)))
    state["w"].fill_(9)
    assert not bool((second.state_dict()["w"] == 9).any())


def test_another_shape_is_an_error_that_names_the_parameter() -> None:
    feedback = Momentum()
    step(feedback, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"momentum of 'w' has shape \(2, 3\).*\(3, 2\); load"):
        feedback.compensate(torch.ones(3, 2), "w")


@pytest.mark.parametrize("beta", [-0.1, 1.0, float("nan")])
def test_beta_out_of_range(beta: float) -> None:
    with pytest.raises(ValueError, match=rf"beta={beta} must be in \[0, 1\); use 0.9"):
        Momentum(beta)


def test_signum_votes_on_the_momentum() -> None:
    """One step against a long-lived direction does not turn the vote."""

    def body(comm: ThreadComm) -> list[torch.Tensor]:
        reducer, outs = make_reducer("signsgd_vote", {"momentum": 0.9}), []
        for size in (1.0, 1.0, -1.0, -20.0):
            outs.append(reducer.reduce({"w": torch.full((50,), size)}, comm)["w"].clone())
            reducer.end_step()
        return outs

    for outs in run_threads(body, 2):
        assert [out.unique().tolist() for out in outs] == [[1.0], [1.0], [1.0], [-1.0]]

"""Error feedback: staging, memory, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from commkit import registry
from commkit.feedback import ErrorFeedback, NoFeedback
from commkit.types import Feedback


def keep(feedback: ErrorFeedback, x: torch.Tensor, sent: torch.Tensor, key: str = "w") -> None:
    """One step in which ``sent`` of ``x`` was sent."""
    feedback.update(feedback.compensate(x, key), sent, key)
    feedback.commit(True)


def test_the_registry_knows_both() -> None:
    assert {"error_feedback", "none"} <= set(registry.names("feedback"))
    assert isinstance(ErrorFeedback(), Feedback)
    assert isinstance(NoFeedback(), Feedback)


def test_what_was_not_sent_comes_back() -> None:
    feedback = ErrorFeedback()
    keep(feedback, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5]))
    assert feedback.holds("w")
    assert not feedback.holds("other")
    assert feedback.compensate(torch.tensor([10.0, 10.0]), "w").tolist() == [10.0, 11.5]


def test_nothing_changes_before_commit() -> None:
    feedback = ErrorFeedback()
    keep(feedback, torch.ones(3), torch.zeros(3))
    before = feedback.state_dict()["w"].clone()
    for _ in range(2):
        delta = feedback.compensate(torch.full((3,), 5.0), "w")
        assert delta.tolist() == [6.0] * 3
        feedback.update(delta, torch.zeros(3), "w")
        assert torch.equal(feedback.state_dict()["w"], before)
        assert feedback.norm() == pytest.approx(3**0.5)
    feedback.commit(True)
    assert feedback.state_dict()["w"].tolist() == [6.0] * 3


def test_a_dropped_step_leaves_no_trace() -> None:
    feedback = ErrorFeedback()
    keep(feedback, torch.ones(3), torch.zeros(3))
    before = feedback.state_dict()["w"].clone()
    for key in ("w", "new"):
        feedback.update(feedback.compensate(torch.full((3,), torch.nan), key), torch.ones(3), key)
    feedback.commit(False)
    assert feedback.state_dict().keys() == {"w"}
    assert torch.equal(feedback.state_dict()["w"], before)
    feedback.commit(True)  # nothing is left to commit
    assert torch.equal(feedback.state_dict()["w"], before)


def test_sending_everything_drops_the_residual() -> None:
    feedback = ErrorFeedback()
    keep(feedback, torch.ones(3), torch.zeros(3))
    delta = feedback.compensate(torch.ones(3), "w")
    feedback.update(delta, delta, "w")
    assert feedback.holds("w")
    feedback.commit(True)
    assert not feedback.holds("w")
    assert feedback.state_dict() == {}
    assert feedback.norm() == 0.0


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 4), (torch.bfloat16, 4), (torch.float16, 4), (torch.float64, 8)],
    ids=str,
)
def test_memory_is_four_bytes_per_element(dtype: torch.dtype, size: int) -> None:
    feedback = ErrorFeedback()
    for _ in range(3):
        keep(feedback, torch.ones(10, 100, dtype=dtype), torch.zeros(10, 100))
    (residual,) = feedback.state_dict().values()
    assert residual.untyped_storage().nbytes() == 1000 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_is_not_touched(dtype: torch.dtype) -> None:
    feedback, x = ErrorFeedback(), torch.ones(5, dtype=dtype)
    for _ in range(2):
        delta = feedback.compensate(x, "w")
        assert delta.dtype == torch.float32
        assert delta.data_ptr() != x.data_ptr()
        feedback.update(delta, torch.zeros(5), "w")
        feedback.commit(True)
    assert x.tolist() == [1.0] * 5


def test_small_updates_of_half_precision_gradients_are_not_lost() -> None:
    """A bfloat16 residual would stop growing at 256 times the update."""
    feedback = ErrorFeedback()
    for _ in range(1000):
        keep(feedback, torch.ones(1, dtype=torch.bfloat16), torch.zeros(1))
    assert feedback.state_dict()["w"].item() == 1000.0


def test_another_shape_is_an_error_that_names_the_parameter() -> None:
    feedback = ErrorFeedback()
    keep(feedback, torch.ones(2, 3), torch.zeros(2, 3), "layer.weight")
    with pytest.raises(ValueError, match=r"'layer.weight' has shape \(2, 3\).*\(3, 2\); load"):
        feedback.compensate(torch.ones(3, 2), "layer.weight")


def test_state_round_trip_copies() -> None:
    first, second = ErrorFeedback(), ErrorFeedback()
    keep(first, torch.ones(3), torch.zeros(3))
    state = first.state_dict()
    second.load_state_dict(state)
    state["w"].fill_(9)
    assert second.state_dict()["w"].tolist() == [1.0] * 3
    second.load_state_dict({})
    assert not second.holds("w")


def test_norm_is_over_all_residuals() -> None:
    feedback = ErrorFeedback()
    keep(feedback, torch.full((4,), 3.0), torch.zeros(4), "a")
    keep(feedback, torch.full((1,), 8.0), torch.zeros(1), "b")
    assert feedback.norm() == pytest.approx(10.0)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_norm_neither_overflows_nor_vanishes(size: float) -> None:
    feedback = ErrorFeedback()
    keep(feedback, torch.full((100,), size), torch.zeros(100))
    assert feedback.norm() == pytest.approx(10 * size, rel=1e-6, abs=0)


def test_without_feedback_nothing_is_kept() -> None:
    feedback, x = NoFeedback(), torch.ones(3, dtype=torch.bfloat16)
    delta = feedback.compensate(x, "w")
    assert delta.dtype == torch.float32
    feedback.update(delta, torch.zeros(3), "w")
    feedback.commit(True)
    assert not feedback.holds("w")
    assert (feedback.norm(), feedback.state_dict()) == (0.0, {})
    feedback.load_state_dict({})
    with pytest.raises(ValueError, match="feedback 'none' got 1 residuals"):
        feedback.load_state_dict({"w": torch.zeros(3)})

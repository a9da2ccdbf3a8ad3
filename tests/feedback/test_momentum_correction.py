"""Momentum correction by itself: staging, state, refusals. Its laws are those of DGC, in tests/optim."""

from __future__ import annotations

import pytest
import torch

import commkit
from commkit import registry
from commkit.feedback import MomentumCorrection
from commkit.types import Feedback


def keep(
    feedback: MomentumCorrection, x: torch.Tensor, sent: torch.Tensor, ok: bool = True
) -> None:
    """One step in which ``sent`` was sent."""
    feedback.update(feedback.compensate(x, "w"), sent, "w")
    feedback.commit(ok)


def values(feedback: MomentumCorrection) -> dict[str, list[float]]:
    return {key: x.tolist() for key, x in feedback.state_dict().items()}


def test_it_is_registered_and_a_feedback() -> None:
    assert "momentum_correction" in registry.names("feedback")
    assert isinstance(MomentumCorrection(), Feedback)


@pytest.mark.parametrize(
    ("masking", "velocity"), [(True, [0.0, 3.0]), (False, [1.5, 3.0])], ids=["masked", "kept"]
)
def test_two_steps_by_hand(masking: bool, velocity: list[float]) -> None:
    feedback = MomentumCorrection(0.5, masking=masking)
    keep(feedback, torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))
    assert values(feedback) == {"w": [1.0, 2.0], "velocity::w": [1.0, 2.0]}
    keep(feedback, torch.tensor([1.0, 2.0]), torch.tensor([2.5, 0.0]))
    assert values(feedback) == {"w": [0.0, 5.0], "velocity::w": velocity}
    assert feedback.norm() == pytest.approx(5.0)


def test_nesterov_by_hand() -> None:
    feedback = MomentumCorrection(0.5, nesterov=True)
    keep(feedback, torch.tensor([2.0]), torch.tensor([0.0]))
    assert values(feedback) == {"w": [3.0], "velocity::w": [1.0]}
    assert feedback.compensate(torch.tensor([1.0]), "w").tolist() == [5.0]


def test_a_dropped_step_leaves_no_trace() -> None:
    feedback = MomentumCorrection()
    keep(feedback, torch.ones(3), torch.zeros(3))
    before = values(feedback)
    keep(feedback, torch.full((3,), torch.nan), torch.ones(3), ok=False)
    assert values(feedback) == before


def test_memory_is_eight_bytes_per_element_and_float32() -> None:
    feedback = MomentumCorrection()
    x = torch.ones(1000, dtype=torch.bfloat16)
    for _ in range(3):
        keep(feedback, x, torch.zeros(1000))
    assert sum(t.untyped_storage().nbytes() for t in feedback.state_dict().values()) == 8000
    assert x.tolist() == [1.0] * 1000


def test_a_release_is_all_that_was_unsent_and_the_end() -> None:
    feedback = MomentumCorrection(0.5)
    keep(feedback, torch.tensor([1.0, 2.0]), torch.zeros(2))
    assert feedback.release(torch.tensor([10.0, 10.0]), "w").tolist() == [11.5, 13.0]
    assert feedback.holds("w")
    feedback.commit(True)
    assert not feedback.holds("w")


def test_state_round_trip_copies() -> None:
    first, second = MomentumCorrection(), MomentumCorrection()
    keep(first, torch.ones(3), torch.zeros(3))
    state = first.state_dict()
    second.load_state_dict(state)
    expected = values(first)
    for x in state.values():
        x.fill_(9)
    assert values(second) == expected


def test_another_shape_is_an_error_that_names_the_parameter() -> None:
    feedback = MomentumCorrection()
    keep(feedback, torch.ones(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"velocity of 'w' has shape \(2, 3\).*\(3, 2\); load"):
        feedback.compensate(torch.ones(3, 2), "w")


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match=rf"momentum={momentum} must be in \[0, 1\)"):
        MomentumCorrection(momentum)


def test_momentum_is_not_applied_twice() -> None:
    """By an optimizer that has its own beside the feedback's."""
    reducer = commkit.schemes.make_reducer(
        {
            "name": "compose",
            "aggregator": {"name": "all_gather", "compressor": "topk"},
            "feedback": "momentum_correction",
        }
    )
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    from commkit.adapters.attach import refuse_double_momentum

    with pytest.raises(ValueError, match=r"momentum=0\.9 and momentum correction would apply"):
        refuse_double_momentum(reducer, optimizer)

"""Staged tensors: one level of undo, and memory that is used again."""

from __future__ import annotations

import pytest
import torch

from commkit.feedback.staged import StagedTensors


def put(tensors: StagedTensors, value: float, ok: bool = True) -> int:
    """One step that makes "w" ``value``; the address it is at."""
    x = tensors.fresh("w", torch.empty(3, 4))
    x.fill_(value)
    tensors.stage("w", x)
    tensors.commit(ok)
    return x.data_ptr()


def content(tensors: StagedTensors) -> float:
    current = tensors.get("w")
    assert current is not None
    assert (current == current[0, 0]).all()
    return float(current[0, 0])


def test_two_memories_take_turns() -> None:
    tensors = StagedTensors(recycle=True)
    places = [put(tensors, step) for step in range(6)]
    assert len(set(places)) == 2
    assert places[0::2] == [places[0]] * 3
    assert content(tensors) == 5


def test_sums_are_staged_in_memory_of_their_own() -> None:
    tensors, change = StagedTensors(recycle=True), torch.ones(3, 4)
    places = []
    for step, ok in enumerate([True, False, True, True, True], start=1):
        total = tensors.stage_sum("w", change)
        assert tensors.staged("w") is total
        assert tensors.get("w") is not total
        places.append(total.data_ptr())
        tensors.commit(ok)
        assert content(tensors) == (step if step < 2 else step - 1)
    assert bool((change == 1).all())
    assert len(set(places)) == 2
    assert change.data_ptr() not in places


def test_a_step_given_up_leaves_what_was_and_its_memory() -> None:
    tensors = StagedTensors(recycle=True)
    places = [put(tensors, step) for step in range(2)]
    for _ in range(3):
        assert put(tensors, torch.nan, ok=False) == places[0]
        assert content(tensors) == 1
    assert put(tensors, 7) == places[0]
    assert content(tensors) == 7


@pytest.mark.parametrize("show", ["state_dict", "items"])
def test_what_was_shown_is_not_written_over(show: str) -> None:
    tensors = StagedTensors(recycle=True)
    for step in range(3):
        put(tensors, step)
    seen = dict(getattr(tensors, show)())["w"]
    for step in range(10, 16):
        put(tensors, step)
        assert bool((seen == 2).all())
    assert content(tensors) == 15


def test_another_shape_dtype_or_removal_gets_other_memory() -> None:
    tensors = StagedTensors(recycle=True)
    for step in range(2):
        put(tensors, step)
    assert tensors.fresh("w", torch.empty(4, 3)).shape == (4, 3)
    put(tensors, 2)
    assert tensors.fresh("w", torch.empty(3, 4, dtype=torch.float64)).dtype == torch.float64
    put(tensors, 3)
    assert tensors.fresh("w", torch.empty(3, 4, dtype=torch.bfloat16)).dtype == torch.float32
    tensors.stage("w", None)
    tensors.commit(True)
    assert "w" not in tensors
    assert not tensors._spare


def test_memory_is_let_go_unless_it_is_wanted_again() -> None:
    tensors = StagedTensors()
    for step in range(3):
        put(tensors, step)
    assert not tensors._spare
    assert content(tensors) == 2


def test_loading_is_a_new_beginning() -> None:
    tensors = StagedTensors(recycle=True)
    for step in range(2):
        put(tensors, step)
    loaded = {"w": torch.full((3, 4), 9.0)}
    tensors.load_state_dict(loaded)
    for step in range(2, 5):
        put(tensors, step)
    assert bool((loaded["w"] == 9).all())
    assert content(tensors) == 4

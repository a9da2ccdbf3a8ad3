"""Steps of a Reducer: counting, reducing twice, policy changes, the configuration as plain data."""

from __future__ import annotations

import json

import pytest
import torch

from commkit import registry
from commkit.aggregators import AllGather, PowerSGD
from commkit.compressors import TopK
from commkit.feedback import ErrorFeedback, NoFeedback
from commkit.policy import Policy
from commkit.reducer import Reducer
from commkit.schemes import make_reducer, make_scheme
from commkit.sim import ThreadComm

from .inputs import on_ranks, residual, sample


def sparse() -> Reducer:
    """Top-k of a tenth, of tensors of any size."""
    return Reducer(AllGather(TopK(0.1)), ErrorFeedback(), Policy(min_numel=0))


def test_a_name_twice_in_a_step_is_an_error() -> None:
    def body(reducer: Reducer, comm: ThreadComm) -> None:
        reducer.reduce({"a": sample((4,), 0), "b": sample((4,), 1)}, comm)
        with pytest.raises(
            RuntimeError, match=r"'b' is reduced twice in step 0; call end_step\(\)"
        ):
            reducer.reduce({"b": sample((4,), 2)}, comm)
        reducer.end_step()
        reducer.reduce({"b": sample((4,), 2)}, comm)

    on_ranks(2, sparse, body)


def test_a_refused_call_does_not_claim_its_other_names() -> None:
    def body(reducer: Reducer, comm: ThreadComm) -> None:
        reducer.reduce({"a": sample((4,), 0)}, comm)
        with pytest.raises(RuntimeError, match="'a' is reduced twice"):
            reducer.reduce({"c": sample((4,), 2), "a": sample((4,), 2)}, comm)
        reducer.reduce({"c": sample((4,), 2)}, comm)

    on_ranks(1, sparse, body)


def test_steps_are_counted_with_or_without_gradients() -> None:
    def body(reducer: Reducer, comm: ThreadComm) -> None:
        for step in range(3):
            if step != 1:
                reducer.reduce({"a": sample((10, 10), step)}, comm)
                reducer.reduce({"b": sample((5,), step, torch.bfloat16)}, comm)
            stats = reducer.end_step()
            assert stats.step == step
            assert stats.dense_bytes == (0 if step == 1 else 400 + 10)
            assert stats.num_contributors == (0 if step == 1 else 2)
            assert not stats.nonfinite
        assert reducer.step == 3
        assert int(reducer.state_dict()["shared/step"]) == 3

    on_ranks(2, sparse, body)


def test_state_changes_at_the_end_of_the_step_only() -> None:
    def body(reducer: Reducer, comm: ThreadComm) -> None:
        reducer.reduce({"a": sample((100,), comm.rank)}, comm)
        assert "rank/a" not in reducer.state_dict()
        reducer.end_step()
        assert "rank/a" in reducer.state_dict()

    on_ranks(2, sparse, body)


def test_a_tensor_that_is_no_longer_compressed_takes_its_residual_with_it() -> None:
    def body(reducer: Reducer, comm: ThreadComm) -> torch.Tensor:
        x = sample((100,), comm.rank)
        first = reducer.reduce({"a": x.clone()}, comm)["a"].clone()
        reducer.end_step()
        reducer.policy = Policy(start_step=100)
        second = reducer.reduce({"a": torch.zeros(100)}, comm)["a"]
        reducer.end_step()
        assert not reducer.feedback.holds("a")
        return torch.stack([first + second, x])

    one, two = on_ranks(2, sparse, body)
    # float32, values below 5
    torch.testing.assert_close(one[0], (one[1] + two[1]) / 2, rtol=1e-6, atol=1e-6)
    assert torch.equal(one[0], two[0])


def test_a_bad_step_does_not_flush_the_residual() -> None:
    def body(reducer: Reducer, comm: ThreadComm) -> None:
        reducer.reduce({"a": sample((100,), comm.rank)}, comm)
        reducer.end_step()
        before = residual(reducer, "a")
        reducer.policy = Policy(start_step=100)
        bad = sample((100,), 7)
        bad[3] = torch.inf if comm.rank else 0.0
        reducer.reduce({"a": bad}, comm)
        assert reducer.end_step().nonfinite
        assert torch.equal(residual(reducer, "a"), before)

    on_ranks(2, sparse, body)


def test_loading_forgets_an_unfinished_step() -> None:
    """A step that went bad and was abandoned must not spoil the first step after loading."""

    def body(reducer: Reducer, comm: ThreadComm) -> None:
        saved = reducer.state_dict()
        reducer.reduce({"a": torch.full((100,), torch.nan)}, comm)
        reducer.load_state_dict(saved)
        reducer.reduce({"a": sample((100,), comm.rank)}, comm)
        stats = reducer.end_step()
        assert not stats.nonfinite
        assert stats.dense_bytes == 400
        assert reducer.feedback.holds("a")

    on_ranks(2, sparse, body)


REDUCERS = [
    name
    for name in registry.names("scheme")
    if name != "compose" and isinstance(make_scheme(name), Reducer)
]


@pytest.mark.parametrize("name", REDUCERS)
def test_spec_is_plain_data(name: str) -> None:
    reducer = make_reducer(name, {"seed": 3})
    spec = reducer.spec()
    assert json.loads(json.dumps(spec)) == spec
    assert spec["seed"] == 3
    assert spec["aggregator"]["name"] in registry.names("aggregator")
    assert spec["feedback"]["name"] in registry.names("feedback")
    assert set(spec["policy"]) == {"start_step", "min_numel", "min_ndim", "exclude"}


def test_spec_tells_every_setting_apart() -> None:
    specs = [
        make_reducer({"name": "powersgd", **knobs}).spec()
        for knobs in ({}, {"rank": 5}, {"warm_start": False}, {"start_step": 1}, {"seed": 1})
    ]
    assert len({json.dumps(spec) for spec in specs}) == len(specs)


def test_spec_does_not_change_with_state() -> None:
    def body(reducer: Reducer, comm: ThreadComm) -> None:
        before = reducer.spec()
        reducer.reduce({"a": sample((30, 40), comm.rank)}, comm)
        reducer.end_step()
        assert reducer.spec() == before

    on_ranks(2, lambda: Reducer(PowerSGD(2), ErrorFeedback()), body)


def test_without_feedback_and_policy_the_defaults_are_used() -> None:
    reducer = Reducer(AllGather(TopK()))
    assert isinstance(reducer.feedback, NoFeedback)
    assert reducer.policy == Policy()

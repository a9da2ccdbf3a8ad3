"""Any compressor with any aggregator and feedback that its ``wire`` allows, from YAML alone.

The product of everything registered is walked: what cannot go together is refused when it is built, and all
the rest keeps the contract.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import yaml

from commkit import registry
from commkit.reducer import Reducer
from commkit.schemes import make_reducer
from commkit.sim import ThreadComm, run_threads
from tests.contract.scheme_cases import Recorder, Tensors, copied

CARRIERS = ("all_reduce", "all_gather", "two_shot")
SHAPES = {"matrix": (40, 30), "vector": (257,), "scalar": ()}
STEPS, BAD_STEP, SAVED_AT = 20, 7, 12
COMBINATIONS = list(
    itertools.product(registry.names("compressor"), CARRIERS, registry.names("feedback"))
)


def text(compressor: str, aggregator: str, feedback: str) -> str:
    """The YAML of a composition."""
    block = {
        "name": "compose",
        "aggregator": {"name": aggregator, "compressor": {"name": compressor}},
        "feedback": feedback,
        "policy": {"min_numel": 0},
    }
    return yaml.safe_dump(block)


def build(compressor: str, aggregator: str, feedback: str) -> Reducer:
    return make_reducer(yaml.safe_load(text(compressor, aggregator, feedback)))


def goes_together(compressor: str, aggregator: str, feedback: str) -> bool:
    code = registry.lookup("compressor", compressor)()
    kept = registry.lookup("feedback", feedback)()
    if aggregator == "all_reduce":
        carried = code.wire == "summable"
    else:
        carried = code.fixed_size
    return carried and (code.allows_error_feedback or not kept.needs_contraction)


def gradients(rank: int, step: int) -> Tensors:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {
        key: torch.randn(shape, generator=generator, dtype=torch.float64)
        for key, shape in SHAPES.items()
    }


def run(reducer: Reducer, comm: ThreadComm, steps: range, trace: dict[str, Any]) -> None:
    recorder = Recorder(reducer.aggregator)
    reducer.aggregator = recorder
    for step in steps:
        own = gradients(comm.rank, step)
        if step == BAD_STEP and comm.rank == 1:
            own["vector"][3] = torch.nan
        before = copied(reducer.state_dict())
        given = copied(own)
        out = copied(reducer.reduce(own, comm))
        stats = reducer.end_step()
        trace["outs"].append(out)
        assert stats.nonfinite == (step == BAD_STEP)
        if stats.nonfinite:
            after = reducer.state_dict()
            assert before.keys() == after.keys()
            assert all(torch.equal(before[k], after[k]) for k in before if k != "shared/step")
            assert not out["vector"].isfinite().all()
            continue
        for key, x in given.items():
            assert out[key].shape == x.shape
            assert out[key].dtype == x.dtype
            assert bool(out[key].isfinite().all())
            trace["given"][key] = trace["given"].get(key, 0) + x
            trace["sent"][key] = trace["sent"].get(key, 0) + recorder.sent[key]
        if step == SAVED_AT:
            trace["saved"] = copied(reducer.state_dict())


@pytest.mark.parametrize(
    ("compressor", "aggregator", "feedback"),
    [case for case in COMBINATIONS if goes_together(*case)],
)
def test_what_goes_together_keeps_the_contract(
    compressor: str, aggregator: str, feedback: str
) -> None:
    def body(comm: ThreadComm) -> dict[str, Any]:
        trace: dict[str, Any] = {"outs": [], "given": {}, "sent": {}}
        reducer = build(compressor, aggregator, feedback)
        run(reducer, comm, range(STEPS), trace)
        trace["state"] = copied(reducer.state_dict())
        again = build(compressor, aggregator, feedback)
        again.load_state_dict(trace["saved"])
        late: dict[str, Any] = {"outs": [], "given": {}, "sent": {}}
        run(again, comm, range(SAVED_AT + 1, STEPS), late)
        trace["late"] = late["outs"]
        return trace

    first, second = run_threads(body, 2)
    for ours, theirs in zip(first["outs"], second["outs"], strict=True):
        for key in SHAPES:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0, equal_nan=True)
    for whole, resumed in zip(first["outs"][SAVED_AT + 1 :], first["late"], strict=True):
        assert all(torch.equal(whole[key], resumed[key]) for key in SHAPES)
    if feedback == "error_feedback":
        for trace in (first, second):
            for key in SHAPES:
                residual = trace["state"].get(f"rank/{key}", 0)
                # Sums of twenty float64 numbers of size 1.
                torch.testing.assert_close(
                    trace["sent"][key] + residual, trace["given"][key], rtol=0, atol=1e-11
                )


@pytest.mark.parametrize(
    ("compressor", "aggregator", "feedback"),
    [case for case in COMBINATIONS if not goes_together(*case)],
)
def test_what_does_not_is_refused_when_it_is_built(
    compressor: str, aggregator: str, feedback: str
) -> None:
    with pytest.raises(TypeError):
        build(compressor, aggregator, feedback)


def test_the_product_has_both_kinds() -> None:
    kinds = {goes_together(*case) for case in COMBINATIONS}
    assert kinds == {True, False}

"""Parts that cannot go together are refused when they are put together, and settings out of range too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from commkit import registry
from commkit.aggregators import (
    AllGather,
    AllReduce,
    Hierarchical,
    LowRankQuantized,
    Noop,
    PowerSGD,
    Robust,
    TernGrad,
    TwoShot,
)
from commkit.compressors import (
    QSGD,
    BlockQuantize,
    Cast,
    DynamicTree,
    Natural,
    NoCompression,
    RandomK,
    Sign,
    SignVote,
    Ternary,
    TopK,
)
from commkit.feedback import ErrorFeedback, Momentum, NoFeedback
from commkit.reducer import Reducer
from commkit.types import Aggregator


@dataclass(frozen=True)
class DataDependent(Cast):
    """A compressor whose payload sizes nobody knows beforehand."""

    fixed_size: ClassVar[bool] = False


@pytest.mark.parametrize("compressor", [Sign(), TopK(), Ternary(), BlockQuantize()], ids=str)
def test_all_reduce_takes_summable_payloads_only(compressor) -> None:
    with pytest.raises(TypeError, match=rf"{type(compressor).__name__}.*all_gather or two_shot"):
        AllReduce(compressor)


@pytest.mark.parametrize("make", [AllGather, TwoShot])
def test_gathers_take_payloads_of_fixed_size_only(make: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="DataDependent has fixed_size=False; use a compressor"):
        make(DataDependent())


@pytest.mark.parametrize("compressor", [NoCompression(), Cast(), RandomK()], ids=str)
def test_summable_payloads_may_go_anywhere(compressor) -> None:
    assert all(
        make(compressor).compressor is compressor for make in (AllReduce, AllGather, TwoShot)
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PowerSGD(rank=0), "rank=0 must be >= 1; use"),
        (lambda: PowerSGD(min_compression_rate=float("nan")), "min_compression_rate=nan must be"),
        (lambda: PowerSGD(min_compression_rate=-1), "min_compression_rate=-1 must be >= 0; use"),
        (lambda: TwoShot(Sign(), granule=7), "granule=7 must be >= 8; use"),
        (lambda: TernGrad(clip=-1.0), "clip=-1.0 must be >= 0; use"),
        (lambda: TernGrad(clip=float("nan")), "clip=nan must be >= 0; use"),
        (lambda: TernGrad(granule=7), "granule=7 must be >= 8; use"),
    ],
)
def test_settings_out_of_range_name_field_value_and_remedy(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


DIVERGENT = [Ternary(), SignVote(), RandomK(unbiased=True), QSGD(), QSGD(4, norm="max")]
CONTRACTIVE = [Sign(), TopK(), RandomK(), QSGD(8), DynamicTree(), Natural(), BlockQuantize(4)]


@pytest.mark.parametrize("compressor", DIVERGENT, ids=str)
def test_error_feedback_is_refused_where_it_diverges(compressor) -> None:
    words = rf"feedback ErrorFeedback diverges on {type(compressor).__name__}.*use .*'none', or"
    with pytest.raises(TypeError, match=words):
        Reducer(AllGather(compressor), ErrorFeedback())
    with pytest.raises(TypeError, match=f"server_{words}"):
        TwoShot(compressor, ErrorFeedback())
    for feedback in (NoFeedback(), Momentum()):
        Reducer(TwoShot(compressor), feedback)


def test_error_feedback_is_refused_on_an_aggregator_too() -> None:
    with pytest.raises(TypeError, match="diverges on TernGrad"):
        Reducer(TernGrad(), ErrorFeedback())
    Reducer(PowerSGD(), ErrorFeedback())


@pytest.mark.parametrize("compressor", CONTRACTIVE, ids=str)
def test_error_feedback_goes_with_contractions(compressor) -> None:
    Reducer(TwoShot(compressor, ErrorFeedback()), ErrorFeedback())


EXAMPLES: dict[str, Callable[[], Aggregator]] = {
    "all_gather": lambda: AllGather(TopK()),
    "all_reduce": lambda: AllReduce(Cast()),
    "hierarchical": lambda: Hierarchical(PowerSGD(), ErrorFeedback(), local_size=2),
    "lowrank_quantized": lambda: LowRankQuantized(4),
    "noop": Noop,
    "powersgd": PowerSGD,
    "robust": lambda: Robust(NoCompression(), "trimmed_mean", 1),
    "terngrad": TernGrad,
    "two_shot": lambda: TwoShot(Sign(), ErrorFeedback()),
}


def test_every_registered_aggregator_has_an_example() -> None:
    assert set(EXAMPLES) == set(registry.names("aggregator"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_aggregators_are_what_their_protocol_says(name: str) -> None:
    aggregator = EXAMPLES[name]()
    assert isinstance(aggregator, Aggregator)
    assert type(aggregator) is registry.lookup("aggregator", name)
    assert aggregator.state_dict() == {}
    aggregator.commit(True)
    aggregator.load_state_dict({})


@pytest.mark.parametrize("name", ["all_gather", "all_reduce", "noop", "robust", "terngrad"])
def test_state_for_an_aggregator_without_state_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="keeps no state but got 1 entries"):
        EXAMPLES[name]().load_state_dict({"shared/w": torch.zeros(3)})

"""Which tensors are compressed: a function of step, size, dimensions, dtype and name."""

from __future__ import annotations

import pytest
import torch

from commkit.policy import Policy
from commkit.types import TensorCtx


def ctx(
    shape: tuple[int, ...] = (64, 64),
    key: str = "layer.weight",
    step: int = 0,
    dtype: torch.dtype = torch.float32,
) -> TensorCtx:
    return TensorCtx(key, torch.Size(shape), dtype, torch.device("cpu"), step, 0)


def test_start_step() -> None:
    policy = Policy(start_step=3)
    assert [policy.compresses(ctx(step=step)) for step in range(5)] == [False] * 3 + [True] * 2


@pytest.mark.parametrize(
    ("shape", "expected"), [((1023,), False), ((1024,), True), ((32, 32), True), ((), False)]
)
def test_small_tensors_stay_dense(shape: tuple[int, ...], expected: bool) -> None:
    assert Policy().compresses(ctx(shape)) is expected


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 2)])
def test_without_a_limit_everything_is_compressed(shape: tuple[int, ...]) -> None:
    assert Policy(min_numel=0).compresses(ctx(shape))


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_empty_tensors_never_are(shape: tuple[int, ...]) -> None:
    assert not Policy(min_numel=0).compresses(ctx(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_what_is_not_floating_never_is(dtype: torch.dtype) -> None:
    assert not Policy(min_numel=0).compresses(ctx(dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_floating_dtype_may_be(dtype: torch.dtype) -> None:
    assert Policy().compresses(ctx(dtype=dtype))


def test_dimensions() -> None:
    policy = Policy(min_numel=0, min_ndim=2)
    assert [policy.compresses(ctx(shape)) for shape in ((), (9,), (3, 3), (1, 1, 2))] == [
        False,
        False,
        True,
        True,
    ]


def test_names_are_excluded_by_pattern() -> None:
    policy = Policy(exclude=["*embed*", "head.?"])
    keys = ["tok_embed.weight", "head.a", "head.ab", "layer.weight", "Embed.weight"]
    assert [policy.compresses(ctx(key=key)) for key in keys] == [False, False, True, True, True]


@pytest.mark.parametrize("name", ["start_step", "min_numel", "min_ndim"])
def test_negative_numbers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=-1 must be >= 0; use 0 for no limit"):
        Policy(**{name: -1})


def test_one_pattern_as_text_is_not_taken_letter_by_letter() -> None:
    """``exclude="*embed*"`` would else exclude everything, silently, by its ``*``."""
    try:
        policy = Policy(exclude="*embed*")
    except (TypeError, ValueError):
        return
    assert policy.compresses(ctx(key="layer.weight"))
    assert not policy.compresses(ctx(key="tok_embed.weight"))


def test_it_is_plain_data() -> None:
    assert Policy(exclude=["a"]) == Policy(exclude=("a",))
    assert hash(Policy(exclude=["a"])) == hash(Policy(exclude=("a",)))

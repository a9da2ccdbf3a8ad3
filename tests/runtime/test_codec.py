"""Tensors on their way through a transport: what is decoded, and what is kept."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from commkit.compressors import BlockQuantize
from commkit.feedback import EF21, ErrorFeedback, NoFeedback
from commkit.policy import Policy
from commkit.runtime.codec import Codec, divided
from commkit.types import Compressor


def made(like: Mapping[str, torch.Tensor], compressor: Compressor | None = None) -> Codec:
    return Codec(compressor, Policy(), 0, like)


def test_parameters_are_divided_evenly_and_wholly() -> None:
    sizes = [70, 10, 30, 0, 40, 20, 1]
    like = {f"p{k}": torch.zeros(n) for k, n in enumerate(sizes)}
    parts = divided(like, 3)
    assert sorted(name for part in parts for name in part) == sorted(like)
    loads = [sum(like[n].numel() for n in part) for part in parts]
    assert max(loads) == 70
    assert divided(like, 1) == [list(like)]


def test_what_is_decoded_and_the_residual_are_what_was_put_in() -> None:
    generator = torch.Generator().manual_seed(0)
    like = {"big": torch.zeros(40, 50), "small": torch.zeros(7)}
    codec = made(like, BlockQuantize(bits=4, rounding="nearest"))
    feedback = codec.feedback(None)
    assert isinstance(feedback, ErrorFeedback)
    put, got = (
        {n: torch.zeros(x.shape, dtype=torch.float64) for n, x in like.items()} for _ in "ab"
    )
    for task in range(6):
        delta = {n: torch.randn(x.shape, generator=generator) for n, x in like.items()}
        accepted = task != 3
        for name, x in delta.items():
            put[name] += x.double() * accepted
        tensors = codec.encode(delta, list(like), task, 1, feedback)
        decoded = codec.decode(tensors, list(like), task)
        feedback.commit(accepted)  # of a push that was dropped nothing is kept
        for name, x in decoded.items():
            got[name] += x.double() * accepted
    residual = feedback.state_dict()
    assert set(residual) == {"big"}
    assert float(residual["big"].norm()) > 0
    torch.testing.assert_close(got["big"] + residual["big"].double(), put["big"], atol=1e-5, rtol=0)
    torch.testing.assert_close(got["small"], put["small"], atol=0, rtol=0)


def test_feedback_that_does_not_fit_is_refused() -> None:
    like = {"w": torch.zeros(2000)}
    assert isinstance(made(like).feedback(None), NoFeedback)
    with pytest.raises(TypeError, match="nothing is left unsent without a compressor"):
        made(like).feedback(ErrorFeedback())
    with pytest.raises(TypeError, match="EF21 sends differences"):
        made(like, BlockQuantize()).feedback(EF21())


def test_messages_that_nobody_encoded_are_refused() -> None:
    like = {"big": torch.zeros(40, 50), "small": torch.zeros(7)}
    codec, names = made(like, BlockQuantize()), list(like)
    delta = {n: torch.randn(x.shape) for n, x in like.items()}
    counts, codes, scales, small = codec.encode(delta, names, 0, 1, NoFeedback())
    assert set(codec.decode([counts, codes, scales, small], names, 0)) == set(names)
    for bad in (
        [counts, codes, scales],
        [counts, codes, scales, small, small],
        [counts[:1], codes, scales, small],
        [-counts, codes, scales, small],
        [counts, codes[:-1], scales, small],
        [counts, codes, scales, small[:-1]],
        [counts, codes, scales, small.double()],
        [counts.flip(0), codes, scales, small],
    ):
        with pytest.raises((ValueError, IndexError)):
            codec.decode(bad, names, 0)

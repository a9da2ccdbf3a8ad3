"""Payloads in one byte buffer: what goes in comes out, whatever the mix of dtypes and sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commkit.aggregators.message import Layout
from commkit.types import Payload

HEALTHY, SICK = torch.tensor(0.0), torch.tensor(torch.nan)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
dtypes = st.sampled_from([torch.uint8, torch.int8, torch.int32, torch.int64, *FLOATS])
shapes = st.lists(st.integers(0, 5), max_size=3)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = torch.Size(draw(shapes))
    dtype = draw(dtypes)
    raw = draw(st.binary(min_size=8, max_size=8))
    numbers = torch.arange(shape.numel()).view(shape) + raw[0]
    return numbers.to(dtype)


payloads = st.lists(st.lists(tensors(), max_size=3).map(tuple), max_size=4)


def same(first: Payload, second: Payload) -> bool:
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        for a, b in zip(first, second, strict=True)
    )


@settings(max_examples=200, deadline=None)
@given(payloads, st.booleans())
def test_round_trip(sent: list[Payload], sick: bool) -> None:
    buffer = Layout(sent).encode(sent, SICK if sick else HEALTHY)
    assert buffer.dtype == torch.uint8
    size = sum(t.numel() * t.element_size() for payload in sent for t in payload)
    assert size < buffer.numel() <= size + 8
    assert buffer.numel() % 8 == 0
    received = Layout(sent).decode(buffer)
    assert all(same(a, b) for a, b in zip(received, sent, strict=True))
    assert bool(Layout(sent).flag(buffer).isnan()) == sick


@settings(max_examples=50, deadline=None)
@given(payloads)
def test_encoding_is_deterministic(sent: list[Payload]) -> None:
    """Padding is zeros, not left-over memory."""
    assert torch.equal(Layout(sent).encode(sent, HEALTHY), Layout(sent).encode(sent, HEALTHY))


def test_a_message_inside_a_larger_buffer_decodes_in_place() -> None:
    sent = [(torch.arange(3, dtype=torch.uint8), torch.tensor([1.5, 2.5], dtype=torch.float64))]
    message = Layout(sent).encode(sent, HEALTHY)
    stacked = torch.stack([message, message, message])
    (received,) = Layout(sent).decode(stacked[1])
    assert same(received, sent[0])
    assert received[1].data_ptr() % 8 == stacked.data_ptr() % 8


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_any_bad_flag_is_told(bad: float) -> None:
    assert not Layout([]).flag(Layout([]).encode([], torch.tensor(bad))).isfinite()

"""Messages as bytes: what is decoded is what was encoded."""

from __future__ import annotations

import pytest
import torch

from commkit.transport import Message
from commkit.transport.wire import body_bytes, decode, encode

TENSORS = (
    torch.tensor(3.5),
    torch.arange(7, dtype=torch.uint8),
    torch.zeros(0, 4),
    torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).T,
    torch.tensor([True, False]),
    torch.tensor([-1, 2**62]),
    torch.tensor([1.0, float("nan"), float("-inf")], dtype=torch.float64),
)


@pytest.mark.parametrize("count", range(len(TENSORS) + 1))
def test_round_trip_bit_for_bit(count: int) -> None:
    header, body = encode(Message(3, 1 << 40, 7, TENSORS[:count]))
    assert body_bytes(header) == body.numel()
    again = decode(header, body)
    assert (again.kind, again.sequence, again.version) == (3, 1 << 40, 7)
    assert len(again.tensors) == count
    for got, expected in zip(again.tensors, TENSORS, strict=False):
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        assert torch.equal(_bytes(got), _bytes(expected))


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def test_it_shares_no_memory_and_leaves_no_byte_undefined() -> None:
    x = torch.ones(5)
    (header, body), (_, other) = encode(Message(0, tensors=(x,))), encode(Message(0, tensors=(x,)))
    assert torch.equal(body, other)
    x.zero_()
    assert torch.equal(decode(header, body).tensors[0], torch.ones(5))


def test_what_is_no_message_is_refused() -> None:
    with pytest.raises(ValueError, match="no message of this library"):
        body_bytes(torch.zeros(6, dtype=torch.int64))


def test_a_dtype_without_a_place_is_refused() -> None:
    with pytest.raises(TypeError, match="complex64"):
        encode(Message(0, tensors=(torch.zeros(1, dtype=torch.complex64),)))

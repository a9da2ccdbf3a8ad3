"""A scheme is the same scheme whatever framework runs it."""

from __future__ import annotations

import pytest

from .conformance import Cell, measured, pairs

pytest.importorskip("accelerate")
pytest.importorskip("deepspeed")
pytest.importorskip("lightning")
pytest.importorskip("transformers")

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str], Cell]:
    return measured()


@pytest.mark.parametrize(("scheme", "framework"), pairs())
def test_losses_and_weights_are_those_of_the_plain_loop(
    table: dict[tuple[str, str], Cell], scheme: str, framework: str
) -> None:
    """Bit for bit: all of them do the same arithmetic in the same order."""
    cell = table[scheme, framework]
    assert (cell.losses, cell.weights) == (0.0, 0.0)


@pytest.mark.parametrize(("scheme", "framework"), pairs())
def test_resumed_training_goes_on_bit_for_bit(
    table: dict[tuple[str, str], Cell], scheme: str, framework: str
) -> None:
    assert table[scheme, framework].resumed == 0.0


@pytest.mark.parametrize(("scheme", "framework"), pairs())
def test_the_scheme_was_at_work(
    table: dict[tuple[str, str], Cell], scheme: str, framework: str
) -> None:
    """The same bytes as in the plain loop, and of what compresses fewer than uncompressed."""
    sent = table[scheme, framework].wire_bytes
    assert sent == table[scheme, "plain"].wire_bytes > 0
    if scheme in ("int8", "sign"):
        assert sent < table["ddp", "plain"].wire_bytes / 3

"""Quantities as people write them: ``100mbit``, ``20ms``, ``7B``, ``80GB``."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Decimal units of bits. tc reads "mbps" as megabytes, others as megabits: refused here.
RATE_UNITS: Mapping[str, float] = {"bit": 1, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
TIME_UNITS: Mapping[str, float] = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
COUNT_UNITS: Mapping[str, float] = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
BYTE_UNITS: Mapping[str, float] = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}

_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z%]*)\s*")


def read_quantity(
    text: str, field: str, units: Mapping[str, float], example: str, shown: str | None = None
) -> tuple[float, str]:
    """Number and unit.

    Args:
        text: what is read; case does not matter in units that have none.
        field: whose value it is, for the message.
        units: that are known.
        example: of a good value.
        shown: the text as it was given, if ``text`` is a cleaned form of it.

    Raises:
        ValueError: no number or an unknown unit.
    """
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2] not in units:
        raise ValueError(
            f"{field}: got {text if shown is None else shown!r}, which is not a number and one of the units "
            f"{', '.join(unit or '(none)' for unit in units)}; write it like {example}"
        )
    return float(match[1]), match[2]


def parse_bandwidth(text: str, field: str = "link") -> float:
    """``"1gbit"`` as bits per second, > 0.

    Raises:
        ValueError: see :func:`read_quantity`; zero.
    """
    cleaned = text.lower().strip().removesuffix("/s")
    return _positive(
        read_quantity(cleaned, field, RATE_UNITS, "1gbit", text), RATE_UNITS, field, text
    )


def parse_seconds(text: str, field: str) -> float:
    """``"20ms"`` as seconds, > 0.

    Raises:
        ValueError: see :func:`read_quantity`; zero.
    """
    return _positive(
        read_quantity(text.lower(), field, TIME_UNITS, "20ms", text), TIME_UNITS, field, text
    )


def parse_count(text: str, field: str = "model_size") -> int:
    """``"7B"`` as 7 000 000 000, >= 1.

    Raises:
        ValueError: see :func:`read_quantity`; zero.
    """
    return round(
        _positive(
            read_quantity(text.lower(), field, COUNT_UNITS, "7B", text), COUNT_UNITS, field, text
        )
    )


def parse_bytes(text: str, field: str = "memory") -> float:
    """``"80GB"`` as bytes, > 0.

    Raises:
        ValueError: see :func:`read_quantity`; zero.
    """
    return _positive(
        read_quantity(text.lower(), field, BYTE_UNITS, "80GB", text), BYTE_UNITS, field, text
    )


def _positive(told: tuple[float, str], units: Mapping[str, float], field: str, text: str) -> float:
    value = told[0] * units[told[1]]
    if not value > 0:
        raise ValueError(f"{field}: got {text!r}, but it must be > 0")
    return value

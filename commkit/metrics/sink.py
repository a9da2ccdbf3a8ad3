"""What every sink does, and what several need."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol


class MetricsSink(Protocol):
    """Takes one record per step: a mapping of names to numbers, of which ``step`` counts from 1. ``None`` is
    "not measured"."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What can be plotted against ``step``."""
    for name, value in record.items():
        if name != "step" and isinstance(value, int | float):
            yield name, float(value)


def finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with inf and NaN, which JSON does not know, as None."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }


def missing(package: str, extra: str, wanted_by: str) -> ModuleNotFoundError:
    """The error for a sink whose package is not installed."""
    return ModuleNotFoundError(
        f"{wanted_by} needs the {package} package, which is not installed; pip install 'commkit[{extra}]'"
    )

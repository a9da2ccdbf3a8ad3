"""Advice as lines of text."""

from __future__ import annotations

from ..cost.predict import Prediction
from .advice import Advice

HEADER = (
    *("scheme", "kind", "H", "step [s]", "error bar", "computes", "exposed [s]"),
    *("compression [s]", "MB/step", "GB/rank", ""),
)


def lines(advice: Advice) -> list[tuple[str, ...]]:
    """A header and a row for each scheme; the last column marks what is recommended and what does not fit."""
    rows = []
    for row in advice.rows:
        mark = "recommended" if row.name == advice.recommended[0] else ""
        if row.name in advice.recommended[1:]:
            mark = "as good"
        rows.append(
            (row.name, row.kind, *_figures(row.prediction), mark if row.fits else "does not fit")
        )
    return [HEADER, *rows]


def _figures(found: Prediction) -> tuple[str, ...]:
    return (
        str(found.sync_every),
        f"{found.step_s:.4g}",
        f"{found.low_s:.3g}..{found.high_s:.3g}",
        f"{found.utilisation:.0%}",
        f"{found.exposed_s:.3g}",
        f"{found.compression_s:.3g}",
        f"{found.wire_bytes / 1e6:.4g}",
        f"{found.memory_bytes / 1e9:.3g}",
    )

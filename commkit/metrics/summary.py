"""A run in a few numbers, from the records of its steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class RunSummary:
    """What the records of a run add up to, of the rank that wrote them. None: not measured in every step.

    ``str()`` of it is a short text to print.

    Args:
        steps: records.
        median_step_seconds: of ``step_seconds``.
        median_exposed_comm_seconds: of ``exposed_comm_seconds``.
        exposed_share: all exposed communication over all time of steps; 0 is "hidden", or "none".
        dense_bytes: of all tensors that were to be sent, uncompressed.
        payload_bytes: of the tensors really handed to collectives.
        wire_bytes: sent.
        compression_ratio: ``dense_bytes / wire_bytes``. That of a plain ring all-reduce over W ranks is W / (2 (W - 1)),
            1 for two ranks and near 1/2 for many, so divide by that to hear how many times fewer bytes it were.
        nonfinite_steps: in which some rank held inf or NaN.
    """

    steps: int
    median_step_seconds: float | None
    median_exposed_comm_seconds: float | None
    exposed_share: float | None
    dense_bytes: int | None
    payload_bytes: int | None
    wire_bytes: int | None
    compression_ratio: float | None
    nonfinite_steps: int | None

    def __str__(self) -> str:
        ratio, share = self.compression_ratio, self.exposed_share
        rows = {
            "steps": f"{self.steps:,}",
            "non-finite steps": _text(self.nonfinite_steps, "{:,}"),
            "median step": _text(self.median_step_seconds, "{:.4g} s"),
            "exposed communication": _text(share, "{:.1%} of the time"),
            "dense": _size(self.dense_bytes),
            "payload": _size(self.payload_bytes),
            "sent": _size(self.wire_bytes) + ("" if ratio is None else f" (dense / {ratio:.3g})"),
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def summary(records: Iterable[Mapping[str, Any]]) -> RunSummary:
    """Add up the records of a run: those of a :class:`~commkit.metrics.Recorder`, or the lines of ``metrics.jsonl``.

    Args:
        records: with the fields of :class:`~commkit.StepStats` and ``step_seconds``; a field that is missing or None
            in any of them is None in the result.
    """
    every = list(records)
    seconds, exposed = _column(every, "step_seconds"), _column(every, "exposed_comm_seconds")
    dense, payload, wire, nonfinite = (
        _total(every, key) for key in ("dense_bytes", "payload_bytes", "wire_bytes", "nonfinite")
    )
    return RunSummary(
        steps=len(every),
        median_step_seconds=median(seconds) if seconds else None,
        median_exposed_comm_seconds=median(exposed) if exposed else None,
        exposed_share=sum(exposed) / sum(seconds) if exposed and seconds and sum(seconds) else None,
        dense_bytes=dense,
        payload_bytes=payload,
        wire_bytes=wire,
        compression_ratio=dense / wire if dense is not None and wire else None,
        nonfinite_steps=nonfinite,
    )


def _column(records: list[Mapping[str, Any]], key: str) -> list[Any] | None:
    values = [record.get(key) for record in records]
    return None if None in values else values


def _total(records: list[Mapping[str, Any]], key: str) -> int | None:
    values = _column(records, key)
    return None if values is None else sum(values)


def _text(value: float | None, pattern: str) -> str:
    return "not measured" if value is None else pattern.format(value)


def _size(count: int | None) -> str:
    if count is None:
        return "not measured"
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.4g} {unit}"

"""The figures of one finished run, out of the files that it has left."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from launch import interface
from launch.rundir import RunDirectory, read_records

_SKIPPED = 5  # steps before the steady state: DDP rebuilds its buckets, caches and links fill
Record = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """Where a run stood at one evaluation.

    Args:
        step: optimizer steps done.
        val_loss: in the task's unit.
        seconds: of training steps; evaluations are not in it.
        wire_bytes: sent by rank 0, as commkit counts.
        tx_bytes: sent by a node's interface, mean over the nodes.
    """

    step: int
    val_loss: float | None
    seconds: float
    wire_bytes: int | None
    tx_bytes: float | None


@dataclass(frozen=True)
class Figures:
    """One finished run. Seconds are medians over its steady steps on rank 0, or means if it sends in some of them
    only; bytes are means per step. None is "not known".

    Args:
        in_rounds: it sends in some steps and not in others, which no median step would show.
        steps: done by the end.
        mean_step_seconds: mean over the steady steps.
        step_seconds: a whole optimizer step.
        compute_seconds: the step without ``exposed_comm_seconds``.
        exposed_comm_seconds: what backward did not hide of communication and compression.
        comm_seconds: inside collectives, hidden or not.
        compression_seconds: the rest of the reductions, hidden or not.
        payload_bytes: of the tensors handed to collectives by rank 0.
        wire_bytes: sent by rank 0, as commkit counts.
        tx_bytes: sent by a node's interface during steps, mean over the nodes.
        interface_ratio: ``tx_bytes`` / (wire_bytes and DDP's buffers), over all nodes and steps.
        payload_ratio: the same without the headers of the interface's packets.
        train_loss: mean of the last steps.
        val_loss: at the end.
        val_accuracy: at the end, of tasks that have it.
        curve: validation on the way.
    """

    in_rounds: bool
    steps: int
    mean_step_seconds: float | None
    step_seconds: float | None
    compute_seconds: float | None
    exposed_comm_seconds: float | None
    comm_seconds: float | None
    compression_seconds: float | None
    payload_bytes: float | None
    wire_bytes: float | None
    tx_bytes: float | None
    interface_ratio: float | None
    payload_ratio: float | None
    train_loss: float | None
    val_loss: float | None
    val_accuracy: float | None
    curve: tuple[Point, ...]


def read_figures(directory: Path, ranks_per_node: int = 1) -> Figures:
    """Figures of a run that ``launch/train.py`` has finished in ``directory``.

    Args:
        directory: its ``--out``.
        ranks_per_node: with more than one, part of the traffic stays inside a node and cannot be
            reconciled with the interface.

    Raises:
        ValueError: the run has no summary or no steps.
    """
    run = RunDirectory(directory)
    records = read_records(run.metrics)
    if not run.summary.is_file() or not records:
        raise ValueError(
            f"run: {str(directory)!r} has no summary.json or no steps, so it did not finish; "
            "look into its logs"
        )
    summary = json.loads(run.summary.read_text(encoding="utf-8"))
    nodes = [read_records(path) for path in sorted((directory / interface.DIRECTORY).glob("*"))]
    steady = records[min(_SKIPPED, len(records) // 5) :]
    interface_ratio, payload_ratio = (
        (None, None) if ranks_per_node > 1 else _reconcile(nodes, summary)
    )
    in_rounds = len({bool(record["wire_bytes"]) for record in steady}) > 1
    usual = _mean if in_rounds else middle
    return Figures(
        in_rounds=in_rounds,
        steps=len(records),
        mean_step_seconds=_mean(record["step_seconds"] for record in steady),
        step_seconds=usual(record["step_seconds"] for record in steady),
        compute_seconds=usual(record["compute_seconds"] for record in steady),
        exposed_comm_seconds=usual(record["exposed_comm_seconds"] for record in steady),
        comm_seconds=usual(record["comm_seconds"] for record in steady),
        compression_seconds=usual(map(_compression, steady)),
        payload_bytes=_mean(record["payload_bytes"] for record in records),
        wire_bytes=_mean(record["wire_bytes"] for record in records),
        tx_bytes=_mean(record["tx_bytes"] for node in nodes for record in node),
        interface_ratio=interface_ratio,
        payload_ratio=payload_ratio,
        train_loss=summary["train_loss"],
        val_loss=summary["val_loss"],
        val_accuracy=summary.get("val_accuracy"),
        curve=_curve(records, read_records(run.validation), nodes, summary),
    )


def middle(values: Iterable[float | None]) -> float | None:
    """The median; None if there is nothing, or something unknown."""
    known = list(values)
    return None if not known or None in known else median(v for v in known if v is not None)


def _mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if not known or None in known else fmean(v for v in known if v is not None)


def _compression(record: Record) -> float | None:
    if record["reduce_seconds"] is None or record["comm_seconds"] is None:
        return None
    return max(0.0, float(record["reduce_seconds"] - record["comm_seconds"]))


def _reconcile(
    nodes: Sequence[Sequence[Record]], summary: Record
) -> tuple[float, float] | tuple[None, None]:
    """Bytes of all interfaces, and these without headers, over bytes that should have been; None
    if either is not known or nothing was to be sent."""
    records = [record for node in nodes for record in node]
    if not records or any(record["wire_bytes"] is None for record in records):
        return None, None
    counted = sum(record["wire_bytes"] for record in records)
    if not counted:
        return None, None
    # DDP sends the buffers from rank 0 to every other rank, once a step.
    buffers = (len(nodes) - 1) * summary.get("buffer_bytes", 0) * len(nodes[0])
    sent = sum(record["tx_bytes"] for record in records)
    headers = interface.HEADER_BYTES * sum(record["tx_packets"] for record in records)
    return sent / (counted + buffers), (sent - headers) / (counted + buffers)


def _curve(
    records: Sequence[Record],
    validation: Sequence[Record],
    nodes: Sequence[Sequence[Record]],
    summary: Record,
) -> tuple[Point, ...]:
    at = {record["step"]: record["val_loss"] for record in validation}
    at[records[-1]["step"]] = summary["val_loss"]
    sent: dict[int, float] = {}
    for node in nodes:
        for record in node:
            sent[record["step"]] = sent.get(record["step"], 0.0) + record["tx_bytes"] / len(nodes)
    points, seconds, wire, tx = [], 0.0, 0, 0.0
    for record in records:
        step = record["step"]
        seconds += record["step_seconds"]
        wire += record["wire_bytes"] or 0
        tx += sent.get(step, 0.0)
        if step in at:
            known = record["wire_bytes"] is not None
            points.append(
                Point(step, at[step], seconds, wire if known else None, tx if sent else None)
            )
    return tuple(points)

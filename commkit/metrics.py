"""What one training step cost, and where such records go: JSON lines, TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class StepStats:
    """The communication of one synchronised step, as seen by this rank.

    Args:
        step: number of steps reduced before this one.
        dense_bytes: bytes of the gradients as they came, uncompressed.
        payload_bytes: bytes of the tensors really handed to collectives.
        wire_bytes: bytes this rank sent, with each collective's factor.
        inter_node_bytes: the part of ``wire_bytes`` that a hierarchical scheme sent between nodes; 0 for
            other schemes, which do not know nodes.
        rounds: collectives.
        comm_seconds: wall time inside collectives.
        reduce_seconds: wall time of the reductions, collectives included.
        exposed_comm_seconds: wall time between the last gradient and the last reduction's end: the part
            that backward did not hide.
        residual_norm: 2-norm of what this rank has left unsent.
        num_contributors: ranks whose gradients are in the mean (the fewest over all tensors).
        nonfinite: some rank held inf or NaN and the step was sent densely, state untouched.
    """

    step: int = 0
    dense_bytes: int = 0
    payload_bytes: int = 0
    wire_bytes: int = 0
    inter_node_bytes: int = 0
    rounds: int = 0
    comm_seconds: float = 0.0
    reduce_seconds: float = 0.0
    exposed_comm_seconds: float = 0.0
    residual_norm: float = 0.0
    num_contributors: int = 0
    nonfinite: bool = False


class MetricsSink(Protocol):
    """Takes one record per step."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLinesSink:
    """Appends one JSON object per step to ``path``; each line is on disk when ``write`` returns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Writes every number of a record as a scalar at ``record["step"]``.

    Raises:
        ModuleNotFoundError: the ``tensorboard`` package is missing.
    """

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "tensorboard: true needs the tensorboard package; pip install tensorboard"
            ) from error
        self._writer: Any = SummaryWriter(str(directory))

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()

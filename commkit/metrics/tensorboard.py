"""Records as TensorBoard scalars."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .sink import missing, numbers


class TensorBoardSink:
    """Writes every number of a record as a scalar at ``record["step"]``.

    Args:
        directory: of the event files.

    Raises:
        ModuleNotFoundError: the ``tensorboard`` package is missing.
    """

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise missing("tensorboard", "tensorboard", "TensorBoardSink") from error
        self._writer: Any = SummaryWriter(str(directory))

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in numbers(record):
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()

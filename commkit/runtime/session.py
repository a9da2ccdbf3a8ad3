"""What a rank takes part in for a while: a ``with`` block meets the others, and tells them why it was left."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType

from typing_extensions import Self


class Session(ABC):
    """Started by ``with``; an exception that leaves the block reaches the others as a text."""

    @abstractmethod
    def start(self) -> Self:
        """Meet all other ranks. Collective."""

    @abstractmethod
    def close(self, error: str | None = None) -> None:
        """Leave; with ``error``, tell others why."""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(None if error is None else f"{kind.__name__ if kind else ''}: {error}")

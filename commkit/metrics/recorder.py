"""From a handle to sinks, in anybody's training loop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from typing_extensions import Self

from .sink import MetricsSink
from .stats import StepStats
from .summary import RunSummary, summary


class Measured(Protocol):
    """What :func:`commkit.attach` returns."""

    @property
    def last_step(self) -> StepStats: ...


class Recorder:
    """Writes what each step cost to sinks, and keeps what the summary needs.

        with Recorder(handle, [TensorBoardSink(Path("runs/1"))]) as recorder:
            for batch in loader:
                ...
                optimizer.step()
                recorder.record(loss=loss.item())
        print(recorder.summary())

    Statistics are of the rank that calls it. It sends nothing, so it may be used on one rank alone.

    Args:
        handle: of ``commkit.attach``, or a method with local updates.
        sinks: which it closes in the end.
        step: steps done before, of a run that is resumed.
    """

    def __init__(self, handle: Measured, sinks: Sequence[MetricsSink] = (), step: int = 0) -> None:
        self._handle = handle
        self._sinks = list(sinks)
        self._kept: list[Mapping[str, Any]] = []
        self._step = step
        self._since = time.perf_counter()

    def record(self, **more: Any) -> dict[str, Any]:
        """A step has ended. Its record: ``step``, counted from 1, ``step_seconds`` since the last call (or since the
        recorder was made), the fields of :class:`~commkit.StepStats`, and ``more``."""
        now = time.perf_counter()
        self._step += 1
        stats = dataclasses.asdict(self._handle.last_step)
        record = stats | {"step": self._step, "step_seconds": now - self._since} | more
        self._since = now
        self._kept.append({key: record[key] for key in _SUMMARISED})
        for sink in self._sinks:
            sink.write(record)
        return record

    def summary(self) -> RunSummary:
        """Of all steps so far. Keeps a few numbers per step."""
        return summary(self._kept)

    def close(self) -> None:
        """Close the sinks."""
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


_SUMMARISED = (
    "step_seconds",
    "exposed_comm_seconds",
    "dense_bytes",
    "payload_bytes",
    "wire_bytes",
    "nonfinite",
)

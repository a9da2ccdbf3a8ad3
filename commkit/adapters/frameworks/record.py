"""What a framework's logger is told."""

from __future__ import annotations

from ...metrics import StepStats
from .connect import Attachment


class Totals:
    """Counts steps' bytes up, since loggers are asked every so many steps only.

    Keys of :meth:`record`: ``commkit/wire_bytes``, of the last step, and ``commkit/total_wire_bytes``, of all since
    training began in this process, both sent by this rank; ``commkit/exposed_comm_seconds`` of the last step;
    ``commkit/residual_norm`` of this rank.
    """

    def __init__(self) -> None:
        self._last = StepStats()
        self._wire_bytes = 0

    def add(self, handle: Attachment) -> None:
        """Call it once after each optimizer step."""
        self._last = handle.last_step
        self._wire_bytes += self._last.wire_bytes

    def record(self) -> dict[str, float]:
        return {
            "commkit/wire_bytes": float(self._last.wire_bytes),
            "commkit/total_wire_bytes": float(self._wire_bytes),
            "commkit/exposed_comm_seconds": self._last.exposed_comm_seconds,
            "commkit/residual_norm": self._last.residual_norm,
        }

"""What a step of all models was like: its line of ``metrics.jsonl``, and the data that went into it."""

from collections.abc import Sequence
from typing import Any

from commkit.straggler import Coordinator, StepRecord
from launch.traffic import Traffic


class Account:
    """
    Args:
        coordinator: started.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._traffic = Traffic(coordinator.transport)

    def samples_in(self, records: Sequence[StepRecord], batch: int) -> int:
        """How many samples are in the weights now, of ``batch`` for each model."""
        workers, total = len(self._coordinator.party.workers), 0
        for record in records:
            share = len(record.contributors) / workers if record.awaited is not None else 1.0
            total += round(share * batch) * (not record.skipped)
        return total

    def line(self, records: Sequence[StepRecord], step: int, tokens: int) -> dict[str, Any]:
        """Of step number ``step``. Bytes are those that this coordinator has sent; what the median worker waited is
        exposed."""
        coordinator = self._coordinator
        sent = self._traffic.since_last()
        took = sum(record.step_seconds for record in records)
        waited = sum(max(0.0, record.seconds - record.compute_seconds) for record in records)
        alive = len(coordinator.party.workers) - len(coordinator.stats.lost_workers)
        parameters = coordinator.party.parameters.values()
        dense = sum(p.numel() * p.element_size() for p in parameters) * alive * len(records)
        return {
            "step": step,
            "loss": sum(record.loss for record in records) / len(records),
            "lr": coordinator.optimizers[0].param_groups[0]["lr"],
            "tokens": tokens,
            "step_seconds": took,
            "compute_seconds": max(0.0, took - waited),
            "exposed_comm_seconds": waited,
            "comm_seconds": sent.seconds,
            "reduce_seconds": sum(record.seconds for record in records),
            "dense_bytes": dense,
            "payload_bytes": sent.payload_bytes,
            "wire_bytes": sent.wire_bytes,
            "rounds": sent.rounds,
            "residual_norm": coordinator.residual_norm,
            "num_contributors": min(len(record.contributors) for record in records),
            "nonfinite": any(record.skipped for record in records),
        }

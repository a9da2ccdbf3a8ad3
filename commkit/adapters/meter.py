"""What one step's reductions cost, from the counters of their communicator."""

import dataclasses

from ..aggregators.nodes import INTER
from ..comm import DistComm
from ..metrics import StepStats


class StepMeter:
    """Turns running counters into the statistics of single steps.

    Args:
        comm: the communicator that the reductions use, and nothing else does.
    """

    def __init__(self, comm: DistComm) -> None:
        self._comm = comm
        self._before = comm.bytes.copy()
        self._seconds = 0.0

    def add(self, seconds: float) -> None:
        """A reduction took this long."""
        self._seconds += seconds

    def close(self, step: StepStats, exposed: float) -> StepStats:
        """``step`` with the costs since the last call; ``exposed`` seconds were not hidden."""
        now, before = self._comm.bytes, self._before
        measured = dataclasses.replace(
            step,
            payload_bytes=now.payload_bytes - before.payload_bytes,
            wire_bytes=now.wire_bytes - before.wire_bytes,
            inter_node_bytes=now.labelled(INTER) - before.labelled(INTER),
            rounds=now.rounds - before.rounds,
            comm_seconds=now.seconds - before.seconds,
            reduce_seconds=self._seconds,
            exposed_comm_seconds=exposed,
        )
        self._before = now.copy()
        self._seconds = 0.0
        return measured

"""What one step's reductions cost, from the counters of their communicator."""

import dataclasses

from ..aggregators.nodes import INTER
from ..metrics import StepStats
from ..types import Comm


class StepMeter:
    """Turns running counters into the statistics of single steps.

    Args:
        comm: the communicator that the reductions use, and nothing else does.
    """

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._before = comm.bytes.copy()
        self._seconds = self._seconds_before = 0.0

    def add(self, seconds: float) -> None:
        """A reduction took this long."""
        self._seconds += seconds

    def close(self, step: StepStats, exposed: float) -> StepStats:
        """``step`` with the costs since the last call; ``exposed`` seconds were not hidden."""
        # A reduction may be going on: look once, so that what it adds meanwhile counts in the next step.
        now, before = self._comm.bytes.copy(), self._before
        seconds = self._seconds
        measured = dataclasses.replace(
            step,
            payload_bytes=now.payload_bytes - before.payload_bytes,
            wire_bytes=now.wire_bytes - before.wire_bytes,
            inter_node_bytes=now.labelled(INTER) - before.labelled(INTER),
            rounds=now.rounds - before.rounds,
            comm_seconds=now.seconds - before.seconds,
            reduce_seconds=seconds - self._seconds_before,
            exposed_comm_seconds=exposed,
        )
        self._before, self._seconds_before = now, seconds
        return measured

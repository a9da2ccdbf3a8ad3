"""What one training step cost."""

from __future__ import annotations

from dataclasses import dataclass


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

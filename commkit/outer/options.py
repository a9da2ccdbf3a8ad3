"""What all methods with local updates can be told alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """
    Args:
        warmup_steps: first steps in which gradients are averaged densely, as DDP would, before replicas go
            their own ways ("post-local" training). A good choice covers the learning-rate warm-up, whose
            large steps make for large first pseudo-gradients.
        on_abort: what becomes of local progress when a round fails: "keep_local" leaves weights as they
            are, and the next round carries both intervals; "rollback" returns to the last synchronised
            weights, for aborts that have numerical reasons.
        inner_state: the inner optimizer's state after a round: "keep" (what the papers do), "reset", or
            "average" over the replicas (2P more elements for Adam).
        average_buffers: batch-norm statistics are averaged with the weights (counters: the largest; other
            integers: the first replica's). False leaves them to each replica.
        offload: anchors and outer momentum live in pinned host memory instead of on the device.
        final_sync: a clean end of the ``with`` block closes the round that is open, so that all replicas
            end with the same weights.
        timeout_s: seconds after which a stuck transfer raises on all ranks.

    Raises:
        ValueError: a value out of range.
    """

    warmup_steps: int = 0
    on_abort: Literal["keep_local", "rollback"] = "keep_local"
    inner_state: Literal["keep", "reset", "average"] = "keep"
    average_buffers: bool = True
    offload: bool = False
    final_sync: bool = True
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be >= 0; use 0 for none")
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s={self.timeout_s} must be > 0; use for example 600")

"""What the collectives that FSDP2 takes in place of its own have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..comm import DistComm


class Collective:
    """FSDP asks it for memory before it calls it.

    Args:
        comm: over the group of the unit's shards.

    Attributes:
        dense_bytes: of all that was handed over so far, uncompressed.
    """

    def __init__(self, comm: DistComm) -> None:
        self._comm = comm
        self.dense_bytes = 0

    def allocate(
        self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

"""Who counts in which layer of a round: all replicas tell the norms of their layers, and conclude the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..types import Comm
from .norms import over_shards
from .penalty import Detectors, Penalty, shares
from .roster import Roster


class LayerRosters:
    """Rosters of the last round's layers, in their order; none before the first.

    Args:
        penalty: who is rejected, and what the others count for; None counts whatever is finite.
        layers: how many.

    Attributes:
        nonfinite: by layer, whether this replica's part in the last round held an inf or NaN.
    """

    def __init__(self, penalty: Penalty | None, layers: int) -> None:
        self._penalty = penalty
        self._layers = layers
        self._detectors: Detectors | None = None
        self._rosters: list[Roster] = []
        self.nonfinite: list[bool] = []

    def __getitem__(self, layer: int) -> Roster:
        return self._rosters[layer]

    def __iter__(self) -> Iterator[Roster]:
        return iter(self._rosters)

    def follow(self, replicas: Iterable[int]) -> None:
        """Detectors go with their replicas: of each that takes part now, the number that it had; a large one where it is
        new."""
        if self._penalty is not None:
            old = self._detectors or Detectors(0, self._layers, self._penalty)
            self._detectors = old.of(replicas)

    def exchange(self, own: Tensor, squares: Tensor, comm: Comm, shards: Comm | None) -> Tensor:
        """On the worker's thread: what all replicas tell. Norms of layers that are not to count are inf; the rank that
        has a replica's first shard decides.

        Args:
            own: (head,) float64: what else this replica tells.
            squares: (layers,) float64: squared norms of this rank's pseudo-gradients.
            comm: one rank of each replica.
            shards: the ranks that hold this replica together; None where this one does alone.

        Returns:
            (replicas, head + layers) float64, on the host.
        """
        raw = over_shards(squares, shards).sqrt()
        self.nonfinite = (~raw.isfinite()).tolist()
        norms = raw.cpu()
        accepted = norms.isfinite()
        if self._detectors is not None:
            accepted = self._detectors.accepts(comm.rank, norms)
        row = torch.cat([own, norms.where(accepted, torch.inf).to(own.device)])
        if shards is not None:
            shards.broadcast(row, 0)
        rows = comm.all_gather(row)
        if shards is not None:
            rows = shards.broadcast(rows.contiguous(), 0)
        return rows.cpu()

    def decide(self, norms: Tensor, weights: Tensor, blended: Callable[[Tensor], Tensor]) -> Tensor:
        """Make the rosters, and let the detectors see what counts.

        Args:
            norms: (replicas, layers), as told; inf does not count.
            weights: (replicas,), 0 for who does not contribute.
            blended: final weights (replicas, layers) from those of the penalty.

        Returns:
            (replicas, layers) bool: what counts.
        """
        counts = norms.isfinite() & (weights > 0)[:, None]
        if self._penalty is None:
            final = weights[:, None].expand_as(norms)
        else:
            final = self._penalty.weights(norms, weights)
        final = shares(blended(final), counts)
        if self._detectors is not None:
            self._detectors.feed(norms.where(counts, torch.inf))
        self._rosters = [Roster(tuple(column)) for column in final.T.tolist()]
        return counts

    def state_dict(self) -> dict[str, Any]:
        return {
            "detectors": None if self._detectors is None else self._detectors.state_dict(),
            "rosters": [list(roster.weights) for roster in self._rosters],
            "nonfinite": list(self.nonfinite),
        }

    def load_state_dict(self, state: Mapping[str, Any], replicas: int) -> None:
        """What ``replicas`` of them, which may be another number, go on from."""
        if self._penalty is not None and state["detectors"] is not None:
            saved = Detectors.of_state(state["detectors"], self._penalty)
            self._detectors = saved.of(range(replicas))
        self._rosters = [Roster(tuple(weights)) for weights in state["rosters"]]
        self.nonfinite = list(state["nonfinite"])

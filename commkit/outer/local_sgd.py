"""Local SGD: replicas train alone, then their weights are averaged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..reducer import Reducer
from .base import OuterSync
from .joining import Ranks
from .options import SyncOptions
from .units import Unit


class LocalSGD(OuterSync):
    """Local SGD (Stich 2019), and with warm-up steps post-local SGD (Lin et al. 2020).

    Every ``sync_every`` inner steps the weights become their (weighted) mean, ``w <- sum_j w_j / W``. With
    ``sync_every=1`` and plain SGD inside this is gradient averaging.

    State: none. With a ``reducer`` differences to the last mean are sent in place of weights, which a
    compressor needs: 4 bytes per parameter for that mean, and what the reducer keeps.

    Args:
        model: as for :class:`OuterSync`.
        optimizer: the inner one. SGD and its momentum buffers stay local.
        sync_every: H; 8 to 32 where links are decent. Larger saves more and drifts more.
        reducer: None averages weights densely.
        options: ``warmup_steps`` makes it post-local: the step of the first learning-rate decay is the
            paper's choice.
        process_group: as for :class:`OuterSync`.
        master_weights: as for :class:`OuterSync`.

    Raises:
        ValueError: ``sync_every`` below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sync_every: int = 16,
        reducer: Reducer | None = None,
        options: SyncOptions | None = None,
        process_group: Ranks = None,
        master_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.anchored = reducer is not None
        super().__init__(
            model,
            optimizer,
            sync_every=sync_every,
            reducer=reducer,
            options=options,
            process_group=process_group,
            master_weights=master_weights,
        )

    def snapshot(self, unit: Unit) -> dict[str, Tensor]:
        if self.anchored:
            return super().snapshot(unit)
        live = {name: self.replica.live(name) for name in unit.parameters}
        return {
            name: x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
            for name, x in live.items()
        }

    def apply(self, unit: Unit, mean: dict[str, Tensor]) -> None:
        if not self.anchored:
            for name, value in mean.items():
                self.replica.write(name, value)
            return
        for name, difference in mean.items():
            anchor = self.anchors.values[name]
            anchor.sub_(difference.to(anchor.device))
        self.anchors.write_back(unit.parameters)

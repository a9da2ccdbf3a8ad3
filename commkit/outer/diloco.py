"""DiLoCo: local AdamW inside, Nesterov momentum on the averaged pseudo-gradients outside."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..reducer import Reducer
from .anchors import OuterOptimizer
from .base import OuterSync
from .joining import Ranks
from .options import SyncOptions
from .units import Unit


def nesterov(lr: float, momentum: float) -> OuterOptimizer:
    """The outer optimizer of the DiLoCo family: ``b <- momentum b + g; anchor <- anchor - lr (g + momentum b)``,
    the first time with ``b = g``. With momentum 0 it is plain SGD.

    Raises:
        ValueError: ``lr`` not above 0, or ``momentum`` outside [0, 1).
    """
    if lr <= 0:
        raise ValueError(f"outer_lr={lr} must be > 0; use 0.7")
    if not 0 <= momentum < 1:
        raise ValueError(f"outer_momentum={momentum} must be in [0, 1); use 0.9")
    return lambda anchors: torch.optim.SGD(anchors, lr=lr, momentum=momentum, nesterov=momentum > 0)


class DiLoCo(OuterSync):
    """DiLoCo (Douillard et al. 2023, algorithm 1).

    Every ``sync_every`` inner steps the pseudo-gradients ``anchor - weight`` are averaged and the outer
    optimizer steps on the anchor with their mean; the weights become the anchor. With ``outer_lr=1`` and
    ``outer_momentum=0`` it is local SGD. One replica alone still steps: a look-ahead optimizer.

    State: 8 bytes per parameter (anchor and momentum, in host memory with ``options.offload``), a
    transient 4 during a round, and what the reducer keeps.

    Args:
        model: as for :class:`OuterSync`.
        optimizer: the inner one; the paper uses AdamW.
        sync_every: H. The paper uses 500; 100 is safer on short runs. While the learning rate warms up
            pseudo-gradients are large: cover it with ``options.warmup_steps``.
        reducer: how pseudo-gradients travel; bf16 and int8 cost no quality in the literature.
        outer_lr: 0.7 in the paper.
        outer_momentum: 0.9 in the paper.
        outer_optimizer: another one in place of Nesterov SGD.
        options: as for :class:`OuterSync`.
        process_group: as for :class:`OuterSync`.
        master_weights: as for :class:`OuterSync`.

    Raises:
        ValueError: ``sync_every`` below 1, ``outer_lr`` not above 0, or ``outer_momentum`` outside [0, 1).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sync_every: int = 100,
        reducer: Reducer | None = None,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        outer_optimizer: OuterOptimizer | None = None,
        options: SyncOptions | None = None,
        process_group: Ranks = None,
        master_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            sync_every=sync_every,
            reducer=reducer,
            outer_optimizer=outer_optimizer or nesterov(outer_lr, outer_momentum),
            options=options,
            process_group=process_group,
            master_weights=master_weights,
        )

    def apply(self, unit: Unit, mean: dict[str, Tensor]) -> None:
        self.anchors.step(mean)
        self.anchors.write_back(unit.parameters)

"""Streaming DiLoCo: the model is synchronised in fragments, behind training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..aggregators.health import are_finite
from ..reducer import Reducer
from ..types import Comm
from .anchors import OuterOptimizer
from .diloco import DiLoCo
from .fragments import Fragments, Pattern, cut, require_divides
from .joining import Ranks
from .mixing import mixing_bound
from .options import SyncOptions
from .transfer import Transfer
from .units import Unit

_BLOCKING_LR, _OVERLAPPED_LR = 0.7, 0.4


class StreamingDiLoCo(DiLoCo):
    """Streaming DiLoCo (Douillard et al. 2025): fragments, overlap and mixing.

    The model is cut into F fragments. Fragment p starts at the inner steps t > 0 with
    ``(t - (p+1) H/F) mod H = 0``, so one starts every H/F steps and the peak of the traffic falls F times; its
    pseudo-gradient ``anchor - weight(t)`` travels while training goes on, and after ``overlap`` steps the
    outer optimizer steps on the anchor with the mean and

        weight <- mixing * weight + (1 - mixing) * anchor.

    Anchors stay equal on all ranks. With one fragment, no overlap and no mixing it is DiLoCo, bit for bit.
    The end of the ``with`` block synchronises every fragment once more, without mixing, so that
    replicas end alike (``options.final_sync``).

    A replica whose fragment is not finite is left out as in DiLoCo, but if its weights still are not when the
    outcome arrives it restarts from the anchors of the whole model: one fragment at a time, the rest
    would poison it again.

    State: 8 bytes per parameter as for DiLoCo, and 4/F while a fragment travels. With ``options.offload``
    anchors and momentum live in host memory and a fragment's are on the device from its start until it is
    applied: (8 + 4)/F bytes per parameter there.

    Differences from the paper: its 4-bit floats are any ``reducer``'s business; ``mixing``, lr and the number
    of layers per fragment are not settled in public, so tune them.

    Args:
        model: as for :class:`OuterSync`.
        optimizer: the inner one.
        sync_every: H, the period of each fragment; must be a multiple of F.
        fragments: F, at most the model's number of layers, about one for 3 layers; or for each fragment the
            names of its modules, to balance them by hand (``fragment_sizes`` tells; the largest makes
            the peak).
        pattern: "strided" (layer l in fragment l mod F) or "sequential" (runs of layers).
        overlap: tau, inner steps between start and use, below H/F; 0 waits. The smallest with tau * (time of
            a step) >= (time of a fragment's reduction) hides all of it; more discards or dilutes local work.
        mixing: alpha in [0, 1]. 0 discards the steps of a replica during the overlap, 1 never synchronises
            weights. None is 0.5 with overlap and 0 without.
        reducer: how pseudo-gradients travel; 4-bit codes do.
        outer_lr: None is 0.7 without overlap, 0.4 with. A warning gives the figure where lr, momentum and
            mixing diverge in the linear analysis of :mod:`commkit.outer.mixing`.
        outer_momentum: 0.9 in the paper.
        outer_optimizer: another one in place of Nesterov SGD; its state is per fragment as long as
            it is per parameter.
        options: as for :class:`OuterSync`.
        process_group: as for :class:`OuterSync`.
        master_weights: as for :class:`OuterSync`.

    Raises:
        ValueError: F does not divide H or exceeds the number of layers, fragments that do not cover the model
            exactly, ``overlap`` outside [0, H/F), ``mixing`` outside [0, 1], or what DiLoCo refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sync_every: int = 100,
        fragments: Fragments = 4,
        pattern: Pattern = "strided",
        overlap: int = 0,
        mixing: float | None = None,
        reducer: Reducer | None = None,
        outer_lr: float | None = None,
        outer_momentum: float = 0.9,
        outer_optimizer: OuterOptimizer | None = None,
        options: SyncOptions | None = None,
        process_group: Ranks = None,
        master_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.fragments, self.pattern = fragments, pattern
        self.overlap = overlap
        self.mixing = (0.5 if overlap else 0.0) if mixing is None else mixing
        if outer_lr is None:
            outer_lr = _OVERLAPPED_LR if overlap else _BLOCKING_LR
        super().__init__(
            model,
            optimizer,
            sync_every=sync_every,
            reducer=reducer,
            outer_lr=outer_lr,
            outer_momentum=outer_momentum,
            outer_optimizer=outer_optimizer,
            options=options,
            process_group=process_group,
            master_weights=master_weights,
        )
        require_divides(sync_every, len(self.units))
        if not 0 <= overlap < self.interval:
            raise ValueError(
                f"overlap={overlap} must be at least 0 and below sync_every/fragments={self.interval}, when "
                f"the next fragment starts; use at most {self.interval - 1}"
            )
        if not 0 <= self.mixing <= 1:
            raise ValueError(
                f"mixing={self.mixing} must be in [0, 1]; 0 takes the anchor, 0.5 halves"
            )
        if outer_optimizer is None:
            self._warn_if_unstable(outer_lr, outer_momentum)

    @property
    def interval(self) -> int:
        """H/F: inner steps between the starts of two fragments."""
        return self.sync_every // len(self.units)

    @property
    def fragment_sizes(self) -> list[int]:
        """Elements of each fragment."""
        sizes = {name: p.numel() for name, p in self.replica.parameters.items()}
        return [sum(sizes[name] for name in unit.parameters) for unit in self.units]

    def make_units(self) -> list[Unit]:
        return cut(self.replica, self.fragments, self.pattern)

    def due(self) -> list[Unit]:
        t, count = self.local_steps, len(self.units)
        if t == 0 or t % self.interval:
            return []
        return [self.units[(t // self.interval - 1) % count]]

    def delay(self, unit: Unit) -> int:
        return self.overlap

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "fragments": [unit.parameters for unit in self.units],
            "overlap": self.overlap,
            "mixing": self.mixing,
        }

    def prepare_sync(self, unit: Unit | None = None) -> None:
        unit = self.units[0] if unit is None else unit
        self.anchors.fetch(unit.parameters)
        super().prepare_sync(unit)

    def carry_out(self, transfer: Transfer, comm: Comm) -> None:
        # A scheme counts how often each parameter was reduced, for instance to take turns.
        self.reducer.step = transfer.number // len(self.units)
        super().carry_out(transfer, comm)

    def apply(self, unit: Unit, mean: dict[str, Tensor]) -> None:
        self.anchors.fetch(unit.parameters)  # it is there already, but after a resumption
        self.anchors.step(mean)
        if self.was_reset:
            self._recover(unit)
        else:
            self.anchors.write_back(unit.parameters, self.mixing)
        self.anchors.evict()

    def roll_back(self, unit: Unit) -> None:
        self._recover(unit)
        self.anchors.evict()

    @torch.no_grad()
    def finish(self) -> None:
        while self._in_flight:
            self.receive()
        mixing, self.mixing = self.mixing, 0.0
        try:
            super().finish()
        finally:
            self.mixing = mixing
        if self.options.final_sync and self.local_steps:
            # The last fragment may have been mixed with no step since.
            self.anchors.write_back(self.replica.parameters)

    def _recover(self, unit: Unit) -> None:
        self.anchors.write_back(unit.parameters)
        if not are_finite(map(self.replica.live, self.replica.parameters)):
            self.anchors.write_back(self.replica.parameters)

    def _warn_if_unstable(self, lr: float, momentum: float) -> None:
        if self.mixing == 1:
            return
        share = self.overlap / self.sync_every
        kappa = mixing_bound(lr, momentum, self.mixing, share)
        if kappa < 1:
            warnings.warn(
                f"outer_lr={lr} with outer_momentum={momentum}, mixing={self.mixing} and overlap={self.overlap} of "
                f"sync_every={self.sync_every} diverges along directions in which a round of local training goes "
                f"more than {kappa:.2f} of the way to the optimum; lower outer_lr or outer_momentum",
                stacklevel=3,
            )

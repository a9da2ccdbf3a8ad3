"""A-EDiT: rounds by the clock, for replicas of unequal speed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..comm import private_comm
from ..reducer import Reducer
from ..runtime.agreement import wrapped_in_ddp
from ..types import Comm
from .anchors import OuterOptimizer
from .edit import EDiT
from .joining import Ranks
from .options import SyncOptions
from .penalty import PAPER, Penalty
from .sign_agreement import Majority
from .units import Unit


class AEDiT(EDiT):
    """A-EDiT (Cheng et al. 2025): :class:`EDiT` with a round after ``sync_seconds`` in place of a number of steps.

    Each replica has a monotonic clock that it sets to zero when a round ends, which aligns them; nobody compares
    clocks. At the end of the first inner step after ``sync_seconds`` it enters the next round, in its next forward
    pass. Fast replicas just do more steps: nobody waits for longer than a step of the slowest. Rounds
    are matched by number, not by step, and ``step`` differs between replicas. Where several ranks are one replica,
    sharded or under DDP, the first one's clock decides: a message to them in every step.

    Runs depend on the clock, so they are not reproducible, and a checkpoint's step is the first replica's.

    Args:
        model: as for :class:`OuterSync`.
        optimizer: the inner one.
        sync_seconds: tau_time. 600 in the paper; long against a transfer and against a step of the slowest
            replica, and below ``options.timeout_s``.
        min_total_steps: a round in which all replicas together did fewer steps is put off by another
            ``sync_seconds``. 100 in the authors' code.
        step_share: rho in [0, 1]: what a replica counts for is ``1 - rho`` parts the penalty's weight and ``rho``
            parts its share of all steps. 0.5 in the authors' code; 0 ignores steps, 1 ignores norms. What
            is rejected has no share.
        reducer: as for :class:`EDiT`.
        outer_lr: as for :class:`EDiT`.
        outer_momentum: as for :class:`EDiT`.
        outer_optimizer: as for :class:`EDiT`.
        penalty: as for :class:`EDiT`.
        prefetch: as for :class:`EDiT`.
        majority: as for :class:`EDiT`.
        layers: as for :class:`EDiT`.
        options: as for :class:`OuterSync`.
        process_group: as for :class:`OuterSync`.
        master_weights: as for :class:`OuterSync`.

    Attributes:
        clock: seconds, monotonic; another one for simulations.

    Raises:
        ValueError: ``sync_seconds`` not above 0 or not below ``options.timeout_s``, ``min_total_steps`` below 0,
            ``step_share`` outside [0, 1], or what :class:`EDiT` refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sync_seconds: float = 600.0,
        min_total_steps: int = 100,
        step_share: float = 0.5,
        reducer: Reducer | None = None,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.8,
        outer_optimizer: OuterOptimizer | None = None,
        penalty: Penalty | None = PAPER,
        prefetch: int = 1,
        majority: Majority | None = None,
        layers: Sequence[str] | None = None,
        options: SyncOptions | None = None,
        process_group: Ranks = None,
        master_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        timeout_s = (options or SyncOptions()).timeout_s
        if not 0 < sync_seconds < timeout_s:
            raise ValueError(
                f"sync_seconds={sync_seconds} must be > 0 and below options.timeout_s={timeout_s:g}, for replicas "
                "without data wait that long for the others; use 600, and a timeout_s of several times that"
            )
        if min_total_steps < 0:
            raise ValueError(f"min_total_steps={min_total_steps} must be >= 0; use 100")
        if not 0 <= step_share <= 1:
            raise ValueError(f"step_share={step_share} must be in [0, 1]; use 0.5")
        super().__init__(
            model,
            optimizer,
            sync_every=1,
            reducer=reducer,
            outer_lr=outer_lr,
            outer_momentum=outer_momentum,
            outer_optimizer=outer_optimizer,
            penalty=penalty,
            prefetch=prefetch,
            majority=majority,
            layers=layers,
            options=options,
            process_group=process_group,
            master_weights=master_weights,
        )
        self.sync_seconds = sync_seconds
        self.min_total_steps = min_total_steps
        self.step_share = step_share
        self.clock = time.monotonic
        self._peers: Comm | None = None
        self._since = 0.0

    def start(self) -> AEDiT:
        super().start()
        self._peers = self._ranks_of_replica()
        self._since = self.clock()
        return self

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "sync_seconds": self.sync_seconds,
            "min_total_steps": self.min_total_steps,
            "step_share": self.step_share,
        }

    def after_step(self) -> None:
        super().after_step()
        if self.local_steps == 0:
            self._since = self.clock()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._since = self.clock()

    def position(self) -> dict[str, int]:
        return {"round": self.round}

    def due(self) -> list[Unit]:
        """The units, if time is up. Collective over the ranks of this replica, where it has several."""
        late = self.clock() - self._since >= self.sync_seconds
        if self._peers is not None:
            late = self._word_of_first(self._peers, late)
        return self.units if late else []

    def round_over(self) -> None:
        self._since = self.clock()

    def worth_while(self, steps: int) -> bool:
        return steps >= self.min_total_steps

    def blended(self, weights: Tensor, steps: Tensor) -> Tensor:
        counts = weights > 0
        by_steps = steps[:, None].where(counts, 0.0)
        by_steps = by_steps / by_steps.sum(0, keepdim=True).clamp(min=1.0)
        return (1 - self.step_share) * weights + self.step_share * by_steps

    def _ranks_of_replica(self) -> Comm | None:
        ddp = wrapped_in_ddp(self.replica.parameters.values())
        if self._shards is not None or ddp is None:
            return self._shards
        timeout_s = self.options.timeout_s
        return private_comm(ddp.process_group, timeout_s)

    def _word_of_first(self, peers: Comm, word: bool) -> bool:
        assert self._worker is not None
        flag = torch.tensor([float(word)], device=self.replica.device)
        self._finished(self._worker.submit(lambda: peers.broadcast(flag, 0), flag))
        return bool(flag)

"""DiLoCoX: DiLoCo one round late, with low-rank int4 pseudo-gradients whose rank follows training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from ..aggregators import LowRankQuantized
from ..compressors import BlockQuantize
from ..feedback import ErrorFeedback
from ..policy import Policy
from ..reducer import Reducer
from ..registry import spec
from ..runtime.alarm import RankFailure
from .adaptive_rank import AdaptiveRank, RankSchedule
from .anchors import OuterOptimizer
from .diloco import nesterov
from .joining import Ranks
from .late import LateSync
from .options import SyncOptions
from .stability import largest_stable_kappa
from .units import Unit

_WARN_BELOW = 0.5  # kappa: a setting that is stable only below this


def low_rank_int4(rank: int = 32, block_size: int = 64) -> Reducer:
    """DiLoCoX's compression: low rank, factors in 4 bits, local error feedback.

    Args:
        rank: of every matrix, the highest that it will ever have; the paper has 2048 for 107B parameters, some
            5 % of the width.
        block_size: factor elements per scale. Smaller follows outliers better, at 4/block_size bytes per
            element; above 128 a block may lose more than error feedback can carry.
    """
    aggregator = LowRankQuantized(rank, BlockQuantize(4, block_size, "nearest"))
    return Reducer(aggregator, ErrorFeedback(), Policy(min_numel=0))


class DiLoCoX(LateSync):
    """DiLoCoX (Qi et al. 2025): at the end of round t the outer Nesterov optimizer steps on the anchors with
    round t-1's compressed mean pseudo-gradient, while round t's is on its way.

    For models in pipeline stages give each stage's module, its inner optimizer, and the ranks that hold the
    same stage: inner and outer state are then of a rank's own stage only (the paper's dual optimizer).

    State: 8 bytes per parameter (anchor and momentum, in host memory with ``options.offload``), 4 of error
    feedback, 4 in flight; 4 more while a round ends, and 4 more while a reduction's residuals are staged;
    ``eager`` adds 8. Without delay and with another reducer it is DiLoCo.

    Args:
        model: as for :class:`OuterSync`.
        optimizer: the inner one; the paper uses AdamW.
        sync_every: H, of the first rounds; the paper uses 125. At least transfer time over step time.
        reducer: how pseudo-gradients travel; None is :func:`low_rank_int4`.
        adaptive_rank: the rule by which rank and H shrink together; "auto" is :class:`AdaptiveRank`'s
            defaults where the reducer has a rank to adapt and none elsewhere; None keeps both fixed.
        eager: a replica's own share of the outcome is taken from the round that just ended in place of the
            round before (Kale et al. 2025), so that only the others' progress is late. Weights then
            start a round a little apart; anchors stay common. Helps most with few replicas.
        outer_lr: 0.7.
        outer_momentum: 0.5. DiLoCo's 0.9 is allowed but one round of delay takes most of its stability: with
            learning rate 0.7 it converges only where a round of local training goes at most 0.36 of the way
            to the optimum, against 0.80 with 0.5 and 1.42 with 0. Adam's steps do not shrink near an optimum, so
            with a high inner rate and long rounds a model oscillates that SGD would train: lower the rate,
            ``sync_every`` or ``outer_lr``, or take :class:`~commkit.outer.co2.CO2`, whose gap holds back.
        outer_optimizer: another one in place of Nesterov SGD.
        delayed: as for :class:`LateSync`.
        options: as for :class:`LateSync`.
        process_group: as for :class:`OuterSync`.
        master_weights: as for :class:`OuterSync`.

    Raises:
        ValueError: a value out of range, an ``adaptive_rank`` for a reducer without a rank, or ``eager`` together
            with another outer optimizer or without delay.

    Warns:
        UserWarning: ``outer_lr`` and ``outer_momentum`` that are stable under delay only below kappa 0.5, with
            the figure.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sync_every: int = 125,
        reducer: Reducer | None = None,
        adaptive_rank: AdaptiveRank | Literal["auto"] | None = "auto",
        eager: bool = False,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.5,
        outer_optimizer: OuterOptimizer | None = None,
        delayed: bool = True,
        options: SyncOptions | None = None,
        process_group: Ranks = None,
        master_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        if eager and (outer_optimizer is not None or not delayed):
            raise ValueError(
                "eager=True corrects the delayed step of the Nesterov optimizer; leave outer_optimizer=None and "
                "delayed=True, or use eager=False"
            )
        super().__init__(
            model,
            optimizer,
            sync_every=sync_every,
            delayed=delayed,
            reducer=low_rank_int4() if reducer is None else reducer,
            outer_optimizer=outer_optimizer or nesterov(outer_lr, outer_momentum),
            options=options,
            process_group=process_group,
            master_weights=master_weights,
        )
        self.eager = eager
        self._given_rank = self.rank
        self._outer = None if outer_optimizer is not None else (outer_lr, outer_momentum)
        self._schedule = self._schedule_of(adaptive_rank)
        self._steps_of_round = sync_every
        self._round_ends = sync_every
        self._progress: dict[
            str, Tensor
        ] = {}  # of this replica, in the round before the last one sent
        self._sent_progress: dict[str, Tensor] = {}  # and in that one
        self._offsets: dict[str, Tensor] = {}  # weights minus rounded anchors, at the round's start
        if delayed and self._outer is not None:
            _warn_if_unstable(*self._outer)

    @property
    def rank(self) -> int | None:
        """Of the last transfer begun; None where the reducer has none."""
        found = self._low_rank
        return None if found is None else found.rank

    @property
    def steps_of_round(self) -> int:
        """H of the round that is open."""
        return self._steps_of_round

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "eager": self.eager,
            "adaptive_rank": None if self._schedule is None else spec(self._schedule.rule),
            "rank": self._given_rank,
        }

    def position(self) -> dict[str, int]:
        own = {"steps_of_round": self._steps_of_round}
        return super().position() | own | ({} if self.rank is None else {"rank": self.rank})

    def reducer_spec(self) -> dict[str, Any]:
        spec_of = super().reducer_spec()
        if self._low_rank is not None:  # which changes, and belongs to the position
            del spec_of["aggregator"]["rank"]
        return spec_of

    def due(self) -> list[Unit]:
        return [] if self.local_steps < self._round_ends else self.units

    def prepare_sync(self, unit: Unit | None = None) -> None:
        # The only place where rank and H change: between two rounds, with no transfer under way.
        if self._schedule is not None and self._low_rank is not None:
            self._schedule.observe(self._low_rank.energies)
            self._low_rank.energies = {}
            self._low_rank.rank, self._steps_of_round = self._schedule.plan(self.round)
        self._round_ends = self.local_steps + self._steps_of_round
        super().prepare_sync(unit)

    def snapshot(self, unit: Unit) -> dict[str, Tensor]:
        values = super().snapshot(unit)
        for name, offset in self._offsets.items():
            values[name].add_(offset)
        if self.eager:
            finite = all(bool(x.isfinite().all()) for x in values.values())
            self._progress = self._sent_progress
            self._sent_progress = {n: x.clone() for n, x in values.items()} if finite else {}
        return values

    def apply(self, unit: Unit, mean: dict[str, Tensor]) -> None:
        self.anchors.step(mean)
        # With nothing newer on its way, as at the end of training, there is nothing to be ahead with.
        if not (self._in_flight and self._sent_progress and self._progress):
            self.roll_back(unit)
            return
        assert self._outer is not None
        lr, momentum = self._outer
        # Nesterov's step is linear in its gradient, so the eager step is the common one and this.
        factor = -lr * (1 + momentum) / self.comm.world_size
        for name in unit.parameters:
            ahead = (self._sent_progress[name] - self._progress[name]).mul_(factor)
            anchor = self.anchors.values[name].detach().to(ahead.device)
            self.replica.write(name, anchor + ahead)
            self._offsets[name] = -self.anchors.difference(name)

    def roll_back(self, unit: Unit) -> None:
        super().roll_back(unit)
        self._offsets.clear()

    def rebuild(self, process_group: Ranks) -> None:
        self._progress, self._sent_progress = {}, {}  # shares among other ranks
        super().rebuild(process_group)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        low_rank = self._low_rank
        return {
            **state,
            "steps_of_round": self._steps_of_round,
            "round_ends": self._round_ends,
            "schedule": None if self._schedule is None else self._schedule.state_dict(),
            "rank": self.rank,
            "energies": {} if low_rank is None else dict(low_rank.energies),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._steps_of_round, self._round_ends = state["steps_of_round"], state["round_ends"]
        if self._low_rank is not None and state["rank"] is not None:
            self._low_rank.rank, self._low_rank.energies = state["rank"], dict(state["energies"])
        if self._schedule is not None and state["schedule"] is not None:
            self._schedule.load_state_dict(state["schedule"])

    def rank_state_dict(self) -> dict[str, dict[str, Tensor]]:
        """What differs between ranks, to be saved per rank as weights are; empty unless ``eager``."""
        return {
            "progress": dict(self._progress),
            "sent_progress": dict(self._sent_progress),
            "offsets": dict(self._offsets),
        }

    def load_rank_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Replace it, after :meth:`load_state_dict`. Without this, as on ranks that are new, nothing is eager
        for two rounds."""
        device = self.replica.device
        self._progress, self._sent_progress, self._offsets = (
            {name: x.to(device, copy=True) for name, x in state[part].items()}
            for part in ("progress", "sent_progress", "offsets")
        )

    @property
    def _low_rank(self) -> LowRankQuantized | None:
        """The part whose rank is adapted. None once it was put between nodes, where ranks of one node reduce
        different matrices and would not agree."""
        aggregator = self.reducer.aggregator
        return aggregator if isinstance(aggregator, LowRankQuantized) else None

    def _schedule_of(self, rule: AdaptiveRank | Literal["auto"] | None) -> RankSchedule | None:
        found = self._low_rank
        if rule is None or (rule == "auto" and found is None):
            return None
        if found is None:
            raise ValueError(
                f"adaptive_rank={rule} needs a reducer with a rank, but this one has "
                f"{type(self.reducer.aggregator).__name__}; use low_rank_int4(), or adaptive_rank='auto'"
            )
        return RankSchedule(
            AdaptiveRank() if isinstance(rule, str) else rule, found.rank, self.sync_every
        )

    def _abort(self, failure: RankFailure) -> None:
        self._progress, self._sent_progress = {}, {}
        if self._low_rank is not None:
            self._low_rank.energies = {}  # some ranks may have them, others not
        super()._abort(failure)


def _warn_if_unstable(lr: float, momentum: float) -> None:
    kappa = largest_stable_kappa(lr, momentum, delay=1)
    if kappa < _WARN_BELOW:
        default = largest_stable_kappa(0.7, 0.5, delay=1)
        warnings.warn(
            f"outer_lr={lr} and outer_momentum={momentum}, one round late, converge only while a round of local "
            f"training goes at most kappa={kappa:.2f} of the way to the optimum (synchronously: "
            f"{largest_stable_kappa(lr, momentum, delay=0):.2f}); use outer_lr=0.7 and outer_momentum=0.5, which allow "
            f"{default:.2f}",
            stacklevel=3,
        )

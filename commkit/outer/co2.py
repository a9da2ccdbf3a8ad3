"""CO2: an outer momentum step on the average of the round before, whose all-reduce hides behind a round."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from ..reducer import Reducer
from ..runtime.alarm import RankFailure
from .joining import Ranks
from .late import LateSync
from .options import SyncOptions
from .stability import co2_floor, co2_is_stable
from .units import Unit

_LARGEST_GAP = 10.0
_MOMENTUM_UP_TO = ((16, 0.0), (32, 0.2), (64, 0.5))
_MOMENTUM_BEYOND = 0.6


def momentum_for(num_ranks: int) -> float:
    """The outer momentum that CO2's authors use with so many ranks (a heuristic of SlowMo's time)."""
    return next((beta for ranks, beta in _MOMENTUM_UP_TO if num_ranks <= ranks), _MOMENTUM_BEYOND)


class CO2(LateSync):
    """CO2 (Sun et al. 2024): SlowMo's outer step (Wang et al. 2020), one round late.

    With D the mean of ``x - w`` (x: where the round started) over the replicas, of the round before::

        g = D / gap;   m <- clip(momentum * m + g);   x <- x - lr * m

    The gap penalises staleness. It is a number, or "adaptive", the library's definition (the paper derives
    one from the distance of model versions; its published code divides by a constant)::

        gap = max(1.1 lr / (1 - momentum), min(10, 1 + |x - x_D| / |D|))

    with x_D where D was measured from: the first term keeps the recursion stable whatever local training
    does, at 0.91 of D of net progress per round; the second holds back while the anchors move faster
    than they learn. It needs no communication and is equal on all ranks.

    State: 12 bytes per parameter (x, m, and the snapshot or outcome in flight; x and m in host memory with
    ``options.offload``), and 4 more for the moment of a round's end, when an outcome and the next snapshot
    meet, plus what the reducer keeps. On the wire: one reduction per round, hidden behind the next.

    Args:
        model: as for :class:`OuterSync`.
        optimizer: the inner one.
        sync_every: tau; the paper uses 1 to 192. The smallest that hides the transfer, see
            :class:`LateSync`: quality falls with tau.
        reducer: how pseudo-gradients travel; None sends them densely.
        outer_lr: alpha; 1 in the paper.
        outer_momentum: beta. None takes it by the number of ranks (:func:`momentum_for`): 0 up to 16, 0.2 up
            to 32, 0.5 up to 64, else 0.6. Momentum multiplies staleness: raise it last.
        staleness_gap: "adaptive", or a constant divisor Lambda (the published code's default is 1).
            Larger is more stable and slower; stable for ``lr kappa / gap + momentum < 1``, kappa being how
            far a round of local training goes towards the optimum, up to 1. A constant that fails at
            kappa=1 warns.
        clip: bound on every element of m, in units of ``clip_unit``. ``math.inf`` turns it off.
        clip_unit: "rms" bounds by ``clip`` times the root mean square of D, tensor by tensor; "absolute"
            by ``clip`` itself. The published code has 1.0 absolute, which means something only with
            ``normalise_lr``: displacements of weights are far smaller.
        normalise_lr: SlowMo's form: D is divided by the inner learning rate that its round ended with, and
            the step multiplied by it, so m is in units of gradients. It matters where the rate
            changes from round to round, or with an absolute clip. Rates must be equal on all ranks.
        delayed: as for :class:`LateSync`; False with gap 1 is SlowMo.
        options: as for :class:`LateSync`.
        process_group: as for :class:`OuterSync`.
        master_weights: as for :class:`OuterSync`.

    Raises:
        ValueError: a value out of range; with ``normalise_lr``, a parameter that the optimizer lacks.

    Warns:
        UserWarning: a constant gap with which the recursion diverges at kappa=1, with the kappa at which
            it begins to.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sync_every: int = 48,
        reducer: Reducer | None = None,
        outer_lr: float = 1.0,
        outer_momentum: float | None = None,
        staleness_gap: float | Literal["adaptive"] = "adaptive",
        clip: float = 10.0,
        clip_unit: Literal["rms", "absolute"] = "rms",
        normalise_lr: bool = False,
        delayed: bool = True,
        options: SyncOptions | None = None,
        process_group: Ranks = None,
        master_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        if not 0 < outer_lr < math.inf:
            raise ValueError(f"outer_lr={outer_lr} must be > 0; use 1")
        if outer_momentum is not None and not 0 <= outer_momentum < 1:
            raise ValueError(
                f"outer_momentum={outer_momentum} must be in [0, 1); use None, which takes it by the number of ranks"
            )
        if staleness_gap != "adaptive" and not (
            isinstance(staleness_gap, int | float) and 0 < staleness_gap < math.inf
        ):
            raise ValueError(
                f"staleness_gap={staleness_gap!r} must be > 0; use 'adaptive', or for example 2"
            )
        if not clip > 0:
            raise ValueError(f"clip={clip} must be > 0; use 10, or math.inf for none")
        if clip_unit not in ("rms", "absolute"):
            raise ValueError(f"clip_unit={clip_unit!r} is unknown; use 'rms' or 'absolute'")
        super().__init__(
            model,
            optimizer,
            sync_every=sync_every,
            delayed=delayed,
            reducer=reducer,
            options=options,
            process_group=process_group,
            master_weights=master_weights,
        )
        self.outer_lr, self.staleness_gap = outer_lr, staleness_gap
        self.clip, self.clip_unit = clip, clip_unit
        self.normalise_lr = normalise_lr
        self._given_momentum = outer_momentum
        self._momenta: dict[str, Tensor] = {}
        self._moved = 0.0  # how far the anchors went at the last round's end
        self._inner_lrs: deque[dict[str, float]] = deque()  # of the rounds in flight
        self._inner_lr: dict[str, float] = {}  # of the outcome that is being applied
        self._groups = self._groups_of(master_weights or {}) if normalise_lr else {}

    @property
    def outer_momentum(self) -> float:
        """Beta: as given, or by the number of ranks, known once started."""
        if self._given_momentum is not None:
            return self._given_momentum
        return momentum_for(self.comm.world_size)

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "outer_lr": self.outer_lr,
            "outer_momentum": self._given_momentum,
            "staleness_gap": self.staleness_gap,
            "clip": self.clip,
            "clip_unit": self.clip_unit,
            "normalise_lr": self.normalise_lr,
        }

    def start(self) -> Self:
        super().start()
        self._warn_if_unstable()
        return self

    def snapshot(self, unit: Unit) -> dict[str, Tensor]:
        groups = self.optimizer.param_groups
        self._inner_lrs.append({n: float(groups[at]["lr"]) for n, at in self._groups.items()})
        return super().snapshot(unit)

    def perform_sync(self) -> None:
        self._inner_lr = self._inner_lrs.popleft()
        super().perform_sync()

    def apply(self, unit: Unit, mean: dict[str, Tensor]) -> None:
        values = self.anchors.values
        mean = {name: d.to(values[name].device) for name, d in mean.items()}
        gap = self.gap(_norm(mean.values()))
        moved = []
        for name, d in mean.items():
            inner_lr = self._inner_lr.get(name, 1.0)
            if inner_lr == 0:  # then nothing was learnt, and nothing may move
                continue
            m = self._momenta.setdefault(name, torch.zeros_like(d))
            m.mul_(self.outer_momentum).add_(d, alpha=1 / (gap * inner_lr))
            self._clip(m, d, inner_lr)
            values[name].sub_(m, alpha=self.outer_lr * inner_lr)
            moved.append(_norm([m]) * self.outer_lr * inner_lr)
        self._moved = math.hypot(*moved)
        self.anchors.write_back(unit.parameters)

    def gap(self, length: float) -> float:
        """Lambda for an outcome of this 2-norm."""
        if self.staleness_gap != "adaptive":
            return float(self.staleness_gap)
        grown = 1 + self._moved / length if length > 0 else _LARGEST_GAP
        return max(co2_floor(self.outer_lr, self.outer_momentum), min(_LARGEST_GAP, grown))

    def roll_back(self, unit: Unit) -> None:
        super().roll_back(unit)
        self._moved = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "momenta": dict(self._momenta),
            "moved": self._moved,
            "inner_lrs": list(self._inner_lrs),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._momenta = {
            name: m.to(self.anchors.values[name].device, copy=True)
            for name, m in state["momenta"].items()
        }
        self._moved = state["moved"]
        self._inner_lrs = deque(state["inner_lrs"])

    def _abort(self, failure: RankFailure) -> None:
        if self.members is None:
            self._inner_lrs.clear()
        super()._abort(failure)

    def _clip(self, m: Tensor, d: Tensor, inner_lr: float) -> None:
        bound = self.clip
        if self.clip_unit == "rms":
            # What did not move this time tells nothing of the scale.
            bound *= _norm([d]) / math.sqrt(max(1, d.numel())) / inner_lr or math.inf
        if bound < math.inf:
            m.clamp_(-bound, bound)

    def _warn_if_unstable(self) -> None:
        gap, beta = self.staleness_gap, self.outer_momentum
        if not self.delayed or gap == "adaptive" or co2_is_stable(self.outer_lr, beta, gap):
            return
        warnings.warn(
            f"CO2 with outer_lr={self.outer_lr}, outer_momentum={beta} and staleness_gap={gap} diverges once a round "
            f"of local training goes kappa={(1 - beta) * gap / self.outer_lr:.3g} of the way to the optimum (1 is "
            f"common); use staleness_gap='adaptive', or at least {co2_floor(self.outer_lr, beta):.3g}",
            stacklevel=4,  # the with block, behind __enter__ and start
        )

    def _groups_of(self, masters: Mapping[str, Tensor]) -> dict[str, int]:
        """By parameter name: the place of its group in the inner optimizer."""
        groups = self.optimizer.param_groups
        places = {id(p): at for at, group in enumerate(groups) for p in group["params"]}
        found = {}
        for name, p in self.replica.parameters.items():
            at = places.get(id(p), places.get(id(masters.get(name))))
            if at is None:
                raise ValueError(
                    f"normalise_lr=True needs the learning rate of {name!r}, which is in no group of the "
                    "optimizer; add it, freeze it, or use normalise_lr=False"
                )
            found[name] = at
        return found


def _norm(tensors: Iterable[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(x, dtype=torch.float64) for x in tensors if x.numel()]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0

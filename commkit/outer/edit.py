"""EDiT: layers are synchronised one after another in the forward pass, and replicas that misbehave do not count."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..aggregators.health import health
from ..reducer import Reducer
from ..registry import spec
from ..runtime.alarm import RankFailure
from ..types import Comm
from .anchors import OuterOptimizer
from .base import OuterSync
from .diloco import nesterov
from .joining import Ranks
from .layer_rosters import LayerRosters
from .layers import layers_of, run_before
from .norms import over_shards, squared_norm
from .options import SyncOptions
from .penalty import PAPER, Penalty
from .roster import require_same_round
from .sign_agreement import Majority, keep_majority
from .transfer import Transfer
from .units import Unit

_NEW = 1 << 30  # in place of the old rank of a replica that had none
_HEAD = 4  # of what a replica tells: round, exhausted, weight, steps; then a norm per layer


class EDiT(OuterSync):
    """EDiT (Cheng et al. 2025): local updates with layer-wise synchronisation and pseudo-gradient penalty.

    After every ``sync_every`` inner steps the next forward pass synchronises the model: before a layer
    computes, its pseudo-gradients are combined and its outer optimizer steps, while the transfer of the next
    layers runs beside the layer's computation. All replicas tell the norms of all their layers in one message
    first; those that are anomalous or not finite do not count in that layer, the others by
    ``Penalty.weights``. A layer in which nobody counts returns to its anchor.

    A round is over before the next ``optimizer.step()``: layers that no forward pass executed are
    synchronised there. Evaluation, later micro-steps of gradient accumulation and the second forward of
    activation checkpointing synchronise nothing. A whole forward that does not go through the model's own
    ``__call__`` is not seen, and its round takes place before the step.

    With ``penalty=None`` it is DiLoCo, bit for bit where addition is.

    Over FSDP2: call ``fully_shard`` with the shard axis of a (replicate, shard) mesh and give
    ``process_group=mesh["replicate"].get_group()``. Layers are then what ``fully_shard`` was called on; each
    rank sends its shards, norms are those of whole layers, and one rank of a replica decides for all its
    shards. Hooks run before FSDP's own, so a layer is gathered after it was synchronised. Where
    ``set_modules_to_forward_prefetch`` makes FSDP gather ahead, the whole model is synchronised before that.

    State: 8 bytes per parameter of this rank's shard (anchor and momentum), and of each layer and replica a
    detector (``warm_rounds`` numbers). A round needs room for ``prefetch + 1`` layers.

    Args:
        model: as for :class:`OuterSync`.
        optimizer: the inner one.
        sync_every: tau. The paper uses 128; 64 where links are decent.
        reducer: how pseudo-gradients travel; every compressor works.
        outer_lr: 0.7 in the authors' example, 0.8 in the paper's large runs.
        outer_momentum: 0.8 in the authors' example, 0.85 in the paper's large runs.
        outer_optimizer: another one in place of Nesterov SGD.
        penalty: see :class:`Penalty`; None averages whatever is finite.
        prefetch: layers whose transfers are begun ahead. 1 hides a transfer behind one layer; more where
            layers are small or links slow, at the cost of the memory. 0 hides nothing.
        majority: "sum" or "count" average only the elements whose sign is the majority's (generalised task
            arithmetic); two more dense all-reduces. None averages all.
        layers: names of the modules that are layers, if those found are wrong; see ``layers_of``.
        options: as for :class:`OuterSync`; with ``warmup_steps`` the paper's first stage of synchronous training.
        process_group: as for :class:`OuterSync`.
        master_weights: as for :class:`OuterSync`.

    Attributes:
        exhausted: True once this replica has no data left. The end of the ``with`` block sets it, and stays
            in rounds until all replicas are there: those with data left go on with theirs.
        rejected: layers of this replica that did not count so far.

    Raises:
        ValueError: ``sync_every`` below 1, ``prefetch`` below 0, ``outer_lr`` not above 0, ``outer_momentum``
            outside [0, 1), an unknown ``majority``, or what ``layers_of`` refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sync_every: int = 128,
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
        if prefetch < 0:
            raise ValueError(f"prefetch={prefetch} must be >= 0; use 1")
        if majority not in (None, "sum", "count"):
            raise ValueError(f"majority={majority!r} must be 'sum', 'count' or None")
        self._names = layers
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
        self.penalty = penalty
        self.prefetch = prefetch
        self.majority = majority
        self.exhausted = False
        self.rejected = 0
        self._rosters = LayerRosters(penalty, len(self.units))
        self._ripe = False  # a round is due and not begun
        self._under_way = False  # a round is begun and not over
        self._pending: deque[Unit] = deque()  # of the open round, not yet submitted
        self._began_at = 0  # local step at which the last round began
        self._next_number = 0  # of the first unit of the next round
        self._began_before = 0  # local step at which the last round but one began
        self._done = 0  # layers of the open round that count
        self._waited = 0.0

    # What the base class asks.

    def make_units(self) -> list[Unit]:
        self._layers = layers_of(self.replica, self._names)
        return self._layers.units

    def settings(self) -> dict[str, Any]:
        return {
            "penalty": None if self.penalty is None else spec(self.penalty),
            "majority": self.majority,
            "layers": [list(unit.parameters) for unit in self.units],
        }

    def start(self) -> EDiT:
        super().start()
        replicas = range(self.comm.world_size)
        self._rosters.follow(
            replicas if self.members is None else self.comm.all_gather_object(_NEW)
        )
        # The last hook goes first: the model's before that of what it computes with itself.
        for module, index in self._layers.needs.items():
            self._hook(module, lambda module, args, index=index: self._before_layer(module, index))
        self._hook(self.replica.model, self._before_model)
        return self

    def rebuild(self, process_group: Ranks) -> None:
        rank = self.comm.rank
        super().rebuild(process_group)
        self._rosters.follow(self.comm.all_gather_object(rank))

    def synchronise(self) -> None:
        self._catch_up()  # a step whose optimizer was not called
        self._ripe = bool(self.due())

    @torch.no_grad()
    def finish(self) -> None:
        """Take part in rounds until no replica has data left. Collective, also without ``options.final_sync``,
        where what this replica did since its last round is left out."""
        self._catch_up()
        self.exhausted = True
        while not self._begin():
            self._catch_up()

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            **self._rosters.state_dict(),
            "ripe": self._ripe,
            "pending": [unit.index for unit in self._pending],
            "began_at": self._began_at,
            "next_number": self._next_number,
            "done": self._done,
            "rejected": self.rejected,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._rosters.load_state_dict(state, self.comm.world_size)
        self._ripe = state["ripe"]
        self._pending = deque(self.units[index] for index in state["pending"])
        self._under_way = bool(self._pending or self._in_flight)
        self._began_at, self._next_number = state["began_at"], state["next_number"]
        self._done, self.rejected = state["done"], state["rejected"]

    @property
    def mid_round(self) -> bool:
        return self._ripe

    def after_resize(self) -> None:
        super().after_resize()
        self._forget_round()
        self._began_at = self.local_steps

    def apply(self, unit: Unit, mean: dict[str, Tensor]) -> None:
        self.anchors.step(mean)
        self.anchors.write_back(unit.parameters)

    def carry_out(self, transfer: Transfer, comm: Comm) -> None:
        index = transfer.unit.index
        transfer.roster = self._rosters[index]
        transfer.finite = not self._rosters.nonfinite[index]
        if transfer.skipped:
            return
        divisors: Mapping[str, Tensor] = {}
        if self.majority is not None:
            divisors = keep_majority(transfer.values, self.majority, comm, transfer.roster)
        transfer.reduce(self.reducer, comm)
        for name, divisor in divisors.items():
            transfer.values[name].div_(divisor)
        if self.penalty is not None and self.penalty.clip is not None:
            squares = squared_norm(transfer.values.values(), transfer.device)
            squares = over_shards(squares, self._shards)
            factor = self.penalty.shrink(squares.sqrt())
            for x in transfer.values.values():
                x.mul_(factor.to(x.dtype))
        transfer.commit(self.reducer, comm, self._shards, self.settle)

    # Rounds. What a rank submits, and what it writes, goes through the units in order, however its
    # forward passes jump about: collectives must be issued in the same order everywhere.

    def round_over(self) -> None:
        """Called when a round is over, or was found not worth while."""

    def worth_while(self, steps: int) -> bool:
        """Whether a round with so many inner steps of all replicas together takes place; the same on every rank."""
        return True

    def blended(self, weights: Tensor, steps: Tensor) -> Tensor:
        """(replicas, layers) final weights, from those of the penalty and (replicas,) steps."""
        return weights

    def _begin(self) -> bool:
        """Tell and be told, and begin a round if there is anything to it; or, if ranks were lost in the middle of it, go on
        with the layers that do not count yet. Collective.

        Returns:
            Whether no replica has data left; the round is over then.
        """
        return self.with_survivors(self._begin_once)

    def _begin_once(self) -> bool:
        if self.members is not None:
            self.members.catch_up()
        self._ripe = False
        steps = self.local_steps - self._began_at
        contributes = not self.exhausted or self.options.final_sync
        squares = self._squares_of_units()
        told: list[Tensor] = []
        own = torch.tensor(
            [
                self._next_number,
                self.exhausted,
                self.weight if contributes and steps and not self.newcomer else 0.0,
                steps,
            ],
            dtype=torch.float64,
            device=squares.device,
        )

        def tell() -> None:
            told.append(self._rosters.exchange(own, squares, self._private_comm, self._shards))

        self.on_worker(tell, [own, squares])
        (rows,) = told
        require_same_round(rows[:, 0])
        all_exhausted = bool(rows[:, 1].all())
        weights, taken = rows[:, 2], rows[:, 3]
        total = int(taken.sum())
        if not bool((weights > 0).any()) or not (all_exhausted or self.worth_while(total)):
            self.round_over()
            return all_exhausted
        self._decide(rows[:, _HEAD:], weights, taken)
        self._began_before, self._began_at = self._began_at, self.local_steps
        self._pending = deque(self.units[self._done :])
        self._under_way = True
        self.round = self._next_number + self._done
        self._next_number += len(self.units)
        if all_exhausted:
            self._advance(len(self.units))
        return all_exhausted

    def _decide(self, norms: Tensor, weights: Tensor, steps: Tensor) -> None:
        """Rosters of all layers from (replicas, layers) norms."""
        counts = self._rosters.decide(norms, weights, lambda final: self.blended(final, steps))
        rank = self._private_comm.rank
        if bool(weights[rank] > 0):
            self.rejected += int((~counts[rank]).sum())

    @torch.no_grad()
    def _advance(self, index: int) -> None:
        """Go on with the round until units up to ``index`` are synchronised, and some more begun."""
        start = time.perf_counter()
        self.with_survivors(lambda: self._go_on(index))
        if self._under_way and not self._pending and not self._in_flight:
            self._under_way, self._done, self.newcomer = False, 0, False
            self.was_reset = any(self._rosters.nonfinite)
            self.round_over()
        self._waited += time.perf_counter() - start

    def _go_on(self, index: int) -> None:
        if self._ripe:
            self._begin()
        while self._pending and self._pending[0].index <= index + self.prefetch:
            self.prepare_sync(self._pending.popleft())
        while self._in_flight and self._in_flight[0].unit.index <= index:
            self.perform_sync()
            self._done += 1

    def _catch_up(self) -> None:
        if self._ripe or self._under_way:
            self._advance(len(self.units))

    def _forget_round(self) -> None:
        self._ripe = self._under_way = False
        self._pending.clear()
        self._done = 0

    def _abort(self, failure: RankFailure) -> NoReturn:
        if self.members is not None:  # the rest of the round is made anew
            if self._under_way:
                self._next_number -= len(self.units)
                self._began_at = self._began_before
            self._ripe, self._under_way = True, False
            self._pending.clear()
            super()._abort(failure)
        # However far ranks got in the round, they agree on the next one's number.
        self._next_number += 0 if self._under_way else len(self.units)
        self.round = self._next_number
        self._forget_round()
        super()._abort(failure)
        raise AssertionError("unreachable")

    def _before_model(self, module: nn.Module, args: Any) -> None:
        """Once per forward pass: is a round due? Asked here alone, so that all layers of it agree."""
        if self._ripe and module.training and torch.is_grad_enabled():
            self._advance(-1)

    def _before_layer(self, module: nn.Module, index: int) -> None:
        # Under activation checkpointing gradients are off here; evaluation must not wait for others.
        if not self._under_way or not self.replica.model.training:
            return
        whole = module is self.replica.model
        run_before(module, whole, index, len(self.units), self._advance)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        super()._before_step(optimizer, args, kwargs)
        self._catch_up()

    def _hook(self, module: nn.Module, hook: Any) -> None:
        self._hooks.append(module.register_forward_pre_hook(hook, prepend=True))

    def _record(self, exposed: float) -> None:
        super()._record(exposed + self._waited)
        self._waited = 0.0

    def _squares_of_units(self) -> Tensor:
        """(layers,) float64: squared norms of this rank's pseudo-gradients, NaN or inf where one is."""
        device = self.replica.device
        rows = []
        for unit in self.units:
            row = squared_norm((self.anchors.difference(name) for name in unit.parameters), device)
            if self.options.average_buffers:
                row = row + health((self.replica.buffers[n] for n in unit.buffers), device)
            rows.append(row)
        return torch.stack(rows)

"""AdLoCo: DiLoCo whose batch grows with the noise, by several trainers that merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..reducer import Reducer
from ..registry import spec
from ..types import Comm
from .anchors import OuterOptimizer
from .diloco import DiLoCo
from .growing_batch import GrowingBatch
from .joining import Ranks
from .norm_test import BatchPlan, BatchTest, NormTest
from .options import SyncOptions
from .trainers import Merge, Merged, Pairing, pick_pair, staged_merge
from .transfer import Transfer
from .units import Unit

LrRule: TypeAlias = Literal["none", "sqrt", "linear"]
_EXPONENTS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


class AdLoCo(DiLoCo):
    """AdLoCo (Kutuzov et al. 2025): adaptive batches, switch mode and merging trainers over DiLoCo.

    The ranks form ``trainers`` groups of neighbours, each of which trains a model of its own by DiLoCo rounds.
    After a round a test of the workers' last gradients says what batch they call for; the batch never shrinks.
    Every ``merge_every`` rounds two trainers become one: weights are averaged by requested batch, the
    trainer with the larger one goes on with its momentum and batch, and the other's workers join it. The end
    of the ``with`` block merges what is left (``options.final_sync``).

    The loop does the micro-batches, as ``plan`` says, and reads it after each step::

        with AdLoCo(model, optimizer, initial_batch=8, max_micro_batch=64) as outer:
            for step in range(steps):
                for _ in range(outer.plan.accumulation):
                    loss = model(loader.take(outer.plan.micro_batch)) / outer.plan.accumulation
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    The test reads ``p.grad`` as the optimizer leaves it: gradients clipped on each worker by another factor
    look less noisy than they are.

    While several trainers live, :meth:`state_dict` is equal on the ranks of one trainer only: save it per
    rank. Loading it is collective.

    State: 8 bytes per parameter as for DiLoCo; a transient 8 for the test and 12 in a merger. Wire: 4 bytes per
    parameter more in each round, for the mean gradient, and about 12 in each merger.

    Differences from the paper: micro-batches are the loop's, so that memory is really limited; inner moments
    survive rounds and mergers; both parts of the inner-product test use their own bound and the variance of
    the norm.

    Args:
        model: as for :class:`OuterSync`.
        optimizer: the inner one.
        sync_every: H.
        initial_batch: samples per worker and step at the start.
        max_micro_batch: the most that a worker can hold; see :func:`largest_micro_batch`.
        switch_at: requests above this many times ``max_micro_batch`` accumulate, those below are truncated to
            it; 2 in the paper, 1 always accumulates.
        max_batch: the most samples per worker and step, such as its share of the data; None is no limit.
        test: :class:`NormTest` (None) or :class:`InnerProductTest`. A trainer of one worker has nothing to
            compare and keeps its batch.
        lr_rule: the inner learning rate is multiplied by 1 ("none"), the root ("sqrt", for Adam) or the first
            power ("linear", for SGD) of the growth of the batch, during ``optimizer.step()`` alone, so that any
            scheduler goes on undisturbed.
        trainers: k, at most the number of ranks. More explore more, each with fewer workers.
        merge_every: f, rounds between mergers.
        merge: "worst+worst" merges the two smallest requests, "best+worst" the largest and the smallest.
        on_plan: called with the new plan whenever it changes.
        reducer: as for :class:`OuterSync`. A merger drops its residuals on the ranks concerned.
        outer_lr: as for :class:`DiLoCo`.
        outer_momentum: as for :class:`DiLoCo`.
        outer_optimizer: as for :class:`DiLoCo`.
        options: as for :class:`OuterSync`. Warm-up steps average over all trainers.
        process_group: as for :class:`OuterSync`.
        master_weights: as for :class:`OuterSync`.

    Attributes:
        requested: the batch that the tests have asked for so far, before switch mode.
        trainer: number of this rank's.
        merges: those that this rank has seen, of all trainers.

    Raises:
        ValueError: a value out of range, or what DiLoCo refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sync_every: int = 100,
        initial_batch: int,
        max_micro_batch: int,
        switch_at: float = 2.0,
        max_batch: int | None = None,
        test: BatchTest | None = None,
        lr_rule: LrRule = "none",
        trainers: int = 1,
        merge_every: int = 2,
        merge: Pairing = "worst+worst",
        on_plan: Callable[[BatchPlan], None] | None = None,
        reducer: Reducer | None = None,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        outer_optimizer: OuterOptimizer | None = None,
        options: SyncOptions | None = None,
        process_group: Ranks = None,
        master_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        for name, value in (
            ("initial_batch", initial_batch),
            ("max_micro_batch", max_micro_batch),
            ("switch_at", switch_at),
            ("trainers", trainers),
            ("merge_every", merge_every),
        ):
            if value < 1:
                raise ValueError(f"{name}={value} must be >= 1")
        if max_batch is not None and max_batch < initial_batch:
            raise ValueError(
                f"max_batch={max_batch} must be at least initial_batch={initial_batch}; lower that"
            )
        if lr_rule not in _EXPONENTS:
            raise ValueError(f"lr_rule={lr_rule!r} must be one of {', '.join(_EXPONENTS)}")
        if merge not in ("worst+worst", "best+worst"):
            raise ValueError(f"merge={merge!r} must be 'worst+worst' or 'best+worst'")
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
        self.initial_batch, self.max_micro_batch = initial_batch, max_micro_batch
        self.switch_at, self.max_batch = switch_at, max_batch
        self.test = NormTest() if test is None else test
        self.lr_rule, self.on_plan = lr_rule, on_plan
        self.num_trainers, self.merge_every, self.merge = trainers, merge_every, merge
        self.trainer = 0
        self.merges: list[Merge] = []
        self._batch = GrowingBatch(initial_batch, max_micro_batch, switch_at, max_batch)
        self._trainers: dict[int, list[int]] = {}
        self._gradients: list[Tensor] | None = None
        self._request: int | None = None
        self._blind = self._finishing = False
        self._own_lrs: list[Any] = []

    @property
    def requested(self) -> int:
        return self._batch.requested

    @property
    def plan(self) -> BatchPlan:
        """How the loop makes its next steps; changes in the last step of a round only."""
        return self._batch.plan

    @property
    def lr_factor(self) -> float:
        """By which ``lr_rule`` multiplies the inner learning rate now."""
        return float(self._batch.growth ** _EXPONENTS[self.lr_rule])

    @property
    def trainers(self) -> dict[int, list[int]]:
        """Ranks of each trainer that is left."""
        return {trainer: list(ranks) for trainer, ranks in self._trainers.items()}

    @property
    def samples_per_step(self) -> int:
        """Of this rank's trainer: micro-batch x accumulation x workers."""
        return self.plan.samples * len(self._trainers[self.trainer])

    @property
    def common_anchors(self) -> bool:
        return self.num_trainers == 1

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "initial_batch": self.initial_batch,
            "max_micro_batch": self.max_micro_batch,
            "switch_at": self.switch_at,
            "max_batch": self.max_batch,
            "test": spec(self.test),
            "lr_rule": self.lr_rule,
            "trainers": self.num_trainers,
            "merge_every": self.merge_every,
            "merge": self.merge,
        }

    # Rounds.

    def round_comm(self, private: Comm) -> Comm:
        world, k = private.world_size, self.num_trainers
        if not self._trainers:
            if k > world:
                raise ValueError(f"trainers={k} must be at most the number of ranks, {world}")
            self.trainer = private.rank * k // world
        own = torch.tensor([float(self.trainer)], device=self.replica.device)
        members: dict[int, list[int]] = {}
        for rank, trainer in enumerate(private.all_gather(own).view(-1).tolist()):
            members.setdefault(int(trainer), []).append(rank)
        return self._regroup(private, members)

    def prepare_sync(self, unit: Unit | None = None) -> None:
        self._gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad
            for p in self.replica.parameters.values()
        ]
        self._blind = all(p.grad is None for p in self.replica.parameters.values())
        super().prepare_sync(unit)

    def carry_out(self, transfer: Transfer, comm: Comm) -> None:
        self._request = None
        if self._gradients is not None and not self._finishing:
            if self._blind and not self.newcomer:
                raise RuntimeError(
                    "no parameter has a gradient after the last step of a round, so the batch test sees nothing; "
                    "call zero_grad() after optimizer.step() has returned, or before backward"
                )
            if self._all_have_gradients(comm):
                self._request = self.test.request(self._gradients, self.plan.samples, comm)
        super().carry_out(transfer, comm)

    def _all_have_gradients(self, comm: Comm) -> bool:
        """No replica has joined in this round; where none can, nobody is asked. Collective over ``comm`` else."""
        if self.members is None:
            return True
        seeing = torch.tensor([float(not self.newcomer)], device=self.replica.device)
        return bool(comm.all_reduce(seeing, "min"))

    def perform_sync(self) -> None:
        super().perform_sync()
        self._gradients = None
        if self._request is not None:
            self._tell(self._batch.grow(self._request))

    def synchronise(self) -> None:
        before = self.round
        super().synchronise()
        if self.round > before and self.round % self.merge_every == 0 and len(self._trainers) > 1:
            self.merge_trainers()

    @torch.no_grad()
    def finish(self) -> None:
        self._finishing = True
        try:
            super().finish()
            while self.options.final_sync and len(self._trainers) > 1:
                self.merge_trainers()
        finally:
            self._finishing = False

    # The batch.

    def _ask_for(self, requested: int) -> None:
        self._tell(self._batch.ask_for(requested))

    def _tell(self, changed: bool) -> None:
        if changed and self.on_plan is not None:
            self.on_plan(self.plan)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        super()._before_step(optimizer, args, kwargs)
        self._restore_lrs()
        factor = self.lr_factor
        if factor != 1.0:
            self._own_lrs = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * factor

    def after_step(self) -> None:
        self._restore_lrs()
        super().after_step()

    def _restore_lrs(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self._own_lrs, strict=False):
            group["lr"] = lr
        self._own_lrs = []

    # Trainers.

    @torch.no_grad()
    def merge_trainers(self) -> None:
        """Make one of two trainers, as the options choose them. Collective over all ranks; between rounds.

        Raises:
            RoundAborted: it failed, here or on another rank; nothing has changed.
        """
        outcome: list[tuple[Merge, Merged | None, Comm, int]] = []
        self.on_worker(lambda: outcome.append(self._meet()))
        merge, merged, comm, step = outcome[0]
        self.merges.append(merge)
        if merged is not None:
            if self.trainer == merge.freed:
                self.trainer = merge.survivor
                if merged.outer_state is not None:
                    assert self.anchors.optimizer is not None
                    self.anchors.optimizer.load_state_dict(merged.outer_state)
            self._take(merged)
            self._ask_for(merge.survivor_batch)
            # Residuals and warm starts belong to models that are no more.
            self.reducer.forget(tuple(self.replica.parameters))
            self.reducer.step = step
        self._round_comm = comm
        like = {name: self.snapshot_like(name) for name in self.replica.parameters}
        self.on_worker(lambda: self.reducer.prepare(like, comm))

    def _meet(self) -> tuple[Merge, Merged | None, Comm, int]:
        """The communication of a merger, on the worker's thread; changes nothing but the groups."""
        everybody = self._private_comm
        own = [float(self.trainer), float(self.requested), float(self.reducer.step)]
        told = everybody.all_gather(
            torch.tensor(own, dtype=torch.float64, device=self.replica.device)
        ).tolist()
        batches = {int(trainer): int(batch) for trainer, batch, _ in told}
        survivor, freed = pick_pair(batches, self.merge)
        merge = Merge(self.round, survivor, freed, batches[survivor], batches[freed])
        step = max(int(s) for trainer, _, s in told if trainer in (survivor, freed))
        members = self.trainers
        sources = members[survivor][0], members[freed][0]
        members[survivor] = sorted(members[survivor] + members.pop(freed))
        label = f"trainers{len(self.merges) + 1}"
        comm = everybody.split(list(members.values()), label)
        merged = None
        if self.trainer in (survivor, freed):
            first, second = (members[survivor].index(rank) for rank in sources)
            share = merge.freed_batch / (merge.survivor_batch + merge.freed_batch)
            buffers = self.replica.buffers if self.options.average_buffers else {}
            merged = staged_merge(self.anchors, buffers, comm, first, second, share)
        everybody.all_reduce(torch.ones(1, device=self.replica.device), "min")
        self._trainers = members
        return merge, merged, comm, step

    def _take(self, merged: Merged) -> None:
        for name, value in merged.anchors.items():
            self.anchors.values[name].copy_(value)
        self.anchors.write_back(merged.anchors)
        for name, value in merged.buffers.items():
            self.replica.buffers[name].copy_(value)

    def _regroup(self, private: Comm, members: dict[int, list[int]]) -> Comm:
        self._trainers = members
        return private.split(list(members.values()), f"trainers{len(self.merges)}")

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "requested": self.requested,
            "trainers": self.trainers,
            "merges": [list(astuple(merge)) for merge in self.merges],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._ask_for(state["requested"])
        self.merges = [Merge(*fields) for fields in state["merges"]]
        if self.members is not None:  # one trainer, of all who are there
            return
        members = {int(trainer): list(ranks) for trainer, ranks in state["trainers"].items()}
        rank = self._private_comm.rank
        self.trainer = next(trainer for trainer, ranks in members.items() if rank in ranks)
        self._round_comm = self._regroup(self._private_comm, members)
        like = {name: self.snapshot_like(name) for name in self.replica.parameters}
        self.reducer.prepare(like, self._round_comm)

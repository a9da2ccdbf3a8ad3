"""Sharded gradients, reduced between replicas while backward goes on."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..comm import DistComm
from ..metrics import StepStats
from ..reducer import Reducer
from ..runtime.backward import EndOfBackward
from ..runtime.meter import StepMeter
from ..runtime.shards import local
from ..runtime.worker import ReductionWorker
from ..sharded.layout import Unit
from .loss_scale import GradScaler, scale_of, unscaled, write_back


class ReplicaReduction:
    """Reduces what FSDP has scattered: each rank its shards, with the ranks that hold the same shards of other
    replicas. Residuals are of shards, so their memory is divided by the number of shard ranks.

    Units are reduced one after another on a thread of their own, in the order in which the first rank's first
    backward pass finished them, and all of them before ``backward()`` returns.

    Args:
        reducer: the scheme.
        units: of the model.
        comm: the ranks that hold the same shards, private to the reductions.
        shards: the ranks that hold this replica, private likewise: a step is not finite if any shard is not.
        worker: the thread.
        grad_scaler: of fp16 training; residuals are kept in the units of unscaled gradients.
    """

    def __init__(
        self,
        reducer: Reducer,
        units: Sequence[Unit],
        comm: DistComm,
        shards: DistComm,
        worker: ReductionWorker,
        grad_scaler: GradScaler | None = None,
    ) -> None:
        self._scaler = grad_scaler
        self._reducer = reducer
        self._comm = comm
        self._shards = shards
        self._worker = worker
        self._meter = StepMeter(comm)
        self.last_step = StepStats()
        trained = (
            {name: p for name, p in unit.parameters.items() if p.requires_grad} for unit in units
        )
        self._units = [unit for unit in trained if unit]
        self._places = {p: at for at, unit in enumerate(self._units) for p in unit.values()}
        self._order = list(reversed(range(len(self._units))))
        self._learned = False
        self._missing: dict[int, set[nn.Parameter]] = {}
        self._finished: list[int] = []
        self._submitted = 0
        self._pending: list[torch.futures.Future[Tensor]] = []
        self._end = EndOfBackward(self._finish)
        self._begin()
        reducer.shards = shards
        reducer.shapes = {name: p.shape for unit in self._units for name, p in unit.items()}
        like = {name: local(p.detach()) for unit in self._units for name, p in unit.items()}
        reducer.prepare(like, comm)
        self._registrations = [
            p.register_post_accumulate_grad_hook(self._ready)  # type: ignore[no-untyped-call]
            for p in self._places
        ]

    def close(self) -> None:
        """Gradients are reduced no more."""
        for registration in self._registrations:
            registration.remove()

    def _begin(self) -> None:
        self._missing = {at: set(unit.values()) for at, unit in enumerate(self._units)}
        self._finished, self._submitted, self._pending = [], 0, []

    def _ready(self, p: Tensor) -> None:
        assert isinstance(p, nn.Parameter)
        self._end.arm()
        at = self._places[p]
        self._missing[at].discard(p)
        if not self._missing[at]:
            self._finished.append(at)
            if self._learned and not self._reducer.whole_step:
                self._submit_finished()

    def _submit_finished(self) -> None:
        """All that may go now: ranks have to agree on the order, whatever they finish first."""
        while (
            self._submitted < len(self._order) and not self._missing[self._order[self._submitted]]
        ):
            self._submit([self._order[self._submitted]])
            self._submitted += 1

    def _submit(self, places: Sequence[int]) -> None:
        named = {name: p for at in places for name, p in self._units[at].items()}
        gradients = {name: _gradient(p) for name, p in named.items()}
        like = next(iter(gradients.values()))

        def reduce() -> Tensor:
            start = time.perf_counter()
            with torch.no_grad():
                scale = scale_of(self._scaler)
                results = self._reducer.reduce(unscaled(gradients, scale), self._comm)
                write_back(results, gradients, scale)
            self._meter.add(time.perf_counter() - start)
            return like

        self._pending.append(self._worker.submit(reduce, like, list(gradients.values())))

    def _finish(self) -> None:
        start = time.perf_counter()
        rest = self._order[self._submitted :]
        if self._reducer.whole_step:
            self._submit(rest)
        else:
            for at in rest:
                self._submit([at])
        for future in self._pending:
            future.wait()
        if not self._learned:
            self._learn_order()
        stats = self._reducer.end_step(keep=self._finite_everywhere())
        self.last_step = self._meter.close(stats, exposed=time.perf_counter() - start)
        self._begin()

    def _finite_everywhere(self) -> bool:
        if self._shards.world_size == 1:
            return True
        device = next(iter(self._places)).device
        flag = torch.tensor([0.0 if self._reducer.finite else 1.0], device=device)
        return float(self._shards.all_reduce(flag, "max")) == 0.0

    def _learn_order(self) -> None:
        order = self._finished + [at for at in self._order if at not in self._finished]
        device = next(iter(self._places)).device
        told = self._comm.broadcast(torch.tensor(order, device=device), src=0)
        self._order, self._learned = told.tolist(), True


def _gradient(p: nn.Parameter) -> Tensor:
    """The shard of its gradient; zeros if backward did not reach it here, as it may have elsewhere."""
    if p.grad is None:
        p.grad = torch.zeros_like(p)
    return local(p.grad.detach())

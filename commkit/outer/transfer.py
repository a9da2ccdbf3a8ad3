"""One unit's way through a round: what is sent, who contributes, what comes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..aggregators.health import are_finite
from ..metrics import StepStats
from ..reducer import Reducer
from ..types import Comm
from .buffers import BufferAverage
from .roster import Roster
from .units import Unit

Settle: TypeAlias = Callable[[Comm], None]


@dataclass
class Transfer:
    """A snapshot on its way.

    Args:
        unit: whose.
        number: of the round; equal on all ranks.
        apply_at: the inner step after which the outcome is applied.
        values: by parameter name, full precision; become the means.
        weight: of this rank's contribution, before it is known whether it is finite.
        buffers: this rank's, to be averaged along.
        extras: more tensors that are averaged densely, in place.

    Attributes:
        finite: whether this rank's values are; what is not is left out of the round.
        roster: who contributed; None until the transfer has been carried out.
        stats: what the reducer tells of it.
        future: completes when the outcome is there.
    """

    unit: Unit
    number: int
    apply_at: int
    values: dict[str, Tensor]
    weight: float = 1.0
    buffers: BufferAverage | None = None
    extras: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._finite: bool | None = None
        self.roster: Roster | None = None
        self.stats = StepStats()
        self.future: torch.futures.Future[Tensor] | None = None
        self._kept: tuple[dict[str, Tensor], list[Tensor]] = {}, []

    @property
    def finite(self) -> bool:
        if self._finite is None:  # asked on the worker's thread, which may wait for an accelerator
            buffers = [] if self.buffers is None else self.buffers.floats
            self._finite = are_finite([*self.values.values(), *buffers])
        return self._finite

    @finite.setter
    def finite(self, finite: bool) -> None:
        self._finite = finite

    @property
    def skipped(self) -> bool:
        """Nobody's values were finite, so there is no outcome."""
        return self.roster is not None and self.roster.num_contributors == 0

    @property
    def tensors(self) -> list[Tensor]:
        buffers = [] if self.buffers is None else self.buffers.floats
        return [*self.values.values(), *buffers, *self.extras]

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors), torch.empty(0)).device

    def keep(self) -> None:
        """Keep a copy of what is sent, for :meth:`restore`."""
        buffers = [] if self.buffers is None else self.buffers.floats
        self._kept = {n: x.clone() for n, x in self.values.items()}, [x.clone() for x in buffers]

    def restore(self) -> None:
        """As it was when it was kept, to be sent again."""
        values, buffers = self._kept
        self.values = {name: x.clone() for name, x in values.items()}
        if self.buffers is not None:
            for x, old in zip(self.buffers.floats, buffers, strict=True):
                x.copy_(old)
        self.roster = self.future = None

    @property
    def waits(self) -> bool:
        """Whether it is to be sent yet."""
        return self.roster is None and self.future is None

    def carry_out(
        self, reducer: Reducer, comm: Comm, shards: Comm | None = None, settle: Settle | None = None
    ) -> None:
        """Turn ``values`` into the weighted mean over the ranks whose values are finite, and commit if
        every rank got that far. Collective over ``comm`` and over ``shards``, the ranks that hold one
        replica together: what is not finite on one of them is left out on all. ``settle`` finds out who got
        that far where ranks may be lost; a barrier does where they may not."""
        if shards is not None:
            finite = torch.tensor([float(self.finite)], device=self.device)
            self.finite = bool(shards.all_reduce(finite, "min"))
        weight = self.weight if self.finite else 0.0
        self.roster = Roster.call(comm, self.number, weight, self.device)
        if not self.skipped:
            self.reduce(reducer, comm)
            self.commit(reducer, comm, shards, settle)
        elif settle is not None:
            settle(comm)

    def reduce(self, reducer: Reducer, comm: Comm) -> None:
        """Turn ``values`` into the weighted mean over the ranks of the roster."""
        assert self.roster is not None
        self._mask(self.roster.share(comm.rank))
        # Nothing of a rank that is left out is sent, so its residuals wait.
        hold = () if self.roster.weights[comm.rank] else tuple(self.values)
        self.values = reducer.reduce(self.values, comm, hold)
        if self.buffers is not None:
            self.buffers.average(comm, self.roster)
        for extra in self.extras:
            comm.all_reduce(extra.div_(comm.world_size))

    def commit(
        self, reducer: Reducer, comm: Comm, shards: Comm | None = None, settle: Settle | None = None
    ) -> None:
        """Who is here has everything; who is not has raised everywhere by now."""
        done = torch.ones(1, device=self.device)
        if settle is None:
            comm.all_reduce(done, "min")
        else:
            settle(comm)
        if shards is not None:
            shards.all_reduce(done, "min")
        stats = reducer.end_step()
        # Here, where nothing else changes residuals.
        self.stats = dataclasses.replace(stats, residual_norm=reducer.residual_norm)

    def _mask(self, share: float) -> None:
        """Scale by ``share``, which is 0 for what must not spread: 0 * NaN would be NaN."""
        if share == 1.0:
            return
        for x in (*self.values.values(), *self.extras):
            x.mul_(share) if share else x.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Of a transfer that has been carried out, or is to be sent again."""
        return {
            "unit": self.unit.index,
            "number": self.number,
            "apply_at": self.apply_at,
            "values": self.values,
            "weights": None if self.roster is None else list(self.roster.weights),
            "buffers": None if self.buffers is None else self.buffers.state_dict(),
            "extras": self.extras,
        }

    @classmethod
    def of_state(
        cls, state: Mapping[str, Any], unit: Unit, live: Mapping[str, Tensor], rank: int
    ) -> Transfer:
        """What :meth:`state_dict` was taken of, as seen by ``rank``; ``live`` are the model's buffers. A rank that has joined
        since adds nothing to what is sent again."""
        weights = state["weights"]
        values = {name: value.clone() for name, value in state["values"].items()}
        if weights is None:
            values = {name: torch.zeros_like(value) for name, value in values.items()}
        transfer = cls(
            unit, state["number"], state["apply_at"], values, weight=float(weights is not None)
        )
        if state["buffers"] is not None:
            transfer.buffers = BufferAverage({name: live[name] for name in unit.buffers})
            transfer.buffers.load_state_dict(state["buffers"])
        transfer.extras = [extra.clone() for extra in state["extras"]]
        if weights is None:
            transfer.keep()
        else:
            transfer.roster = Roster(tuple(weights))
            transfer.finite = rank >= len(weights) or weights[rank] > 0
        return transfer

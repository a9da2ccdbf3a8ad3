"""The shape of the methods without a collective: replicas that differ, and meet a few others at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..metrics import StepStats
from ..runtime.alarm import Alarm, NoAlarm
from ..types import Comm
from .base import OuterSync
from .flat import WireDtype, check_wire_dtype, flat, full, parts
from .joining import Ranks
from .options import SyncOptions
from .peers import Peers
from .roster import Roster
from .transfer import Transfer
from .units import Unit

T = TypeVar("T")
NOBODY = Roster((0.0,))
_COUNTER = "num_batches_tracked"


def refusal_of(check: Callable[[], object]) -> str:
    """What ``check`` says in its ValueError; empty if it raises none."""
    try:
        check()
    except ValueError as error:
        return str(error)
    return ""


class Decentralised(OuterSync):
    """Rounds are point-to-point exchanges; collectives are used when it starts, and to average the gradients
    of warm-up steps, and never in a round.

    Replicas stay different. A clean end of the ``with`` block merges them (``options.final_sync``): one mean of
    the weights and of batch-norm statistics over all ranks that are left, sent between pairs. During training
    batch-norm statistics stay local; :func:`~commkit.outer.recompute_batch_norm` after the merge is better
    still.

    A peer that is lost, or whose message holds an inf or NaN, is left out, its share going to oneself: see
    ``peers`` for who and how often. A replica that is not finite itself takes what its peers have, and its inner
    optimizer starts anew.

    With ``members`` a round ends with one small all-reduce, as a peer that is lost makes all who are left make it anew;
    call :meth:`merge` and what else all ranks call together outside of the loop's blocks then.

    Every rank saves its own :attr:`replica_state`. :meth:`state_dict` is the first rank's; a job of another
    size starts from its weights.

    Args:
        wire_dtype: "bf16" halves the bytes. What both sides of an exchange subtract is what was sent, so the
            mean over ranks does not feel the rounding; replicas come as close to each other as bf16 tells apart.

    Attributes:
        peers: who is lost, who is suspect, how many messages were missed.
        ranks: who takes part, in the order in which pairs and topologies are laid over them.

    Raises:
        ValueError: ``options.inner_state="average"``, which takes a collective.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sync_every: int,
        wire_dtype: WireDtype = "fp32",
        options: SyncOptions | None = None,
        process_group: Ranks = None,
        master_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_wire_dtype(wire_dtype)
        if options is not None and options.inner_state == "average":
            raise ValueError(
                f"options.inner_state='average' takes a collective, and {type(self).__name__} has none; use 'keep'"
            )
        super().__init__(
            model,
            optimizer,
            sync_every=sync_every,
            options=options,
            process_group=process_group,
            master_weights=master_weights,
        )
        self.wire_dtype = wire_dtype
        self._donor: Mapping[str, Tensor] | None = None
        self._finishing = False
        self.ranks: tuple[int, ...] = ()

    # What a method defines.

    def lay_out(self, ranks: tuple[int, ...]) -> None:
        """Decide who meets whom among ``ranks``; called when it starts and when they change."""

    def exclude(self, lost: Collection[int]) -> None:
        """Go on without ``lost`` ranks: who meets whom is laid out anew. Every rank that is left must call it
        between the same two steps; until then the share of a lost rank goes to who misses it."""
        self.peers.lost |= set(lost)
        self.ranks = tuple(rank for rank in self.ranks if rank not in lost)
        self.lay_out(self.ranks)

    def own_state(self) -> dict[str, Any]:
        """What this rank alone keeps besides anchors."""
        return {}

    def load_own_state(self, state: Mapping[str, Any]) -> None: ...

    def mass(self) -> float:
        """By what :meth:`contribution` has to be divided, after both have been averaged."""
        return 1.0

    def contribution(self, name: str) -> Tensor:
        """What this rank has of parameter ``name`` in a merge, in full precision."""
        return full(self.replica.live(name))

    # Merging.

    @torch.no_grad()
    def merge(self) -> None:
        """Give all ranks that are left the mean of their weights and batch-norm statistics: the same bits
        everywhere. All of them call it, after the same step. Finishes what is in flight first."""
        while self._in_flight:
            self.receive()
        self._write_merged(self._merged())

    @torch.no_grad()
    def probe_merge(self, evaluate: Callable[[nn.Module], T]) -> T:
        """What ``evaluate`` says of the model as it would be after :meth:`merge`, which is then undone. All
        ranks that are left call it, after the same step."""
        with self.merged() as model:
            return evaluate(model)

    @contextmanager
    def merged(self) -> Iterator[nn.Module]:
        """Inside, the model has the merged weights and batch-norm statistics; outside its own, bit for bit."""
        with torch.no_grad():
            merged = self._merged()
            tensors = [self.replica.live(name) for name in self.replica.parameters]
            tensors += [p.detach() for p in self.replica.parameters.values()]
            tensors += list(self.replica.buffers.values())
            kept = [x.clone() for x in tensors]
            self._write_merged(merged, anchor=False)
        try:
            yield self.model
        finally:
            with torch.no_grad():
                for x, old in zip(tensors, kept, strict=True):
                    x.copy_(old)

    @torch.no_grad()
    def consensus_distance(self) -> float:
        """``||x_i - mean x|| / ||mean x||`` of this rank. All ranks that are left call it, after the same step,
        every 500 steps or so: it costs a merge. If it keeps growing, lower the learning rate, communicate more
        often, or take a topology with a larger gap."""
        merged = self._merged()
        own = flat({name: self.replica.live(name) for name in self.replica.parameters}).double()
        mean = flat({name: merged[name] for name in self.replica.parameters}).double()
        return float((own - mean).norm() / mean.norm())

    def _merged(self) -> dict[str, Tensor]:
        """Means of parameters and buffers, by name; if ranks are lost that are missed, of those that are left."""
        return self.with_survivors(self._mean_of_all)

    def _mean_of_all(self) -> dict[str, Tensor]:
        if self.members is not None:
            for transfer in self._in_flight:  # it is of these workers
                self._wait(transfer)
            self.merging = not self._finishing  # who joins in the last one comes to it by itself
            self.members.catch_up()
        shared = {name: self.contribution(name) for name in self.replica.parameters}
        buffers = dict(self.replica.buffers) if self.options.average_buffers else {}
        floats = {n: b for n, b in buffers.items() if b.is_floating_point()}
        others = {n: b for n, b in buffers.items() if not b.is_floating_point()}
        mass = torch.tensor([self.mass()], device=self.replica.device)
        message = flat({**shared, "mass of this rank": mass, **floats})
        outcome: dict[str, Tensor] = {}

        def job() -> None:
            x = self.peers.mean(message, include=bool(message.isfinite().all()))
            outcome.update(parts(x, {**shared, "mass of this rank": mass, **floats}))
            for name, buffer in others.items():
                values = list(self.peers.gather(buffer).values())
                latest = torch.stack(values).amax(0) if name.endswith(_COUNTER) else values[0]
                outcome[name] = latest
            self.settle_outcome()

        self._finished(self.in_background(job, [message]))
        self.merging = False
        total = outcome.pop("mass of this rank").view(())
        for name in shared:
            outcome[name] = outcome[name] / total
        return outcome

    def _write_merged(self, merged: Mapping[str, Tensor], anchor: bool = True) -> None:
        for name in self.replica.parameters:
            self.replica.write(name, merged[name])
            if anchor and self._anchors is not None:
                self._anchors.values[name].copy_(merged[name])
        for name, buffer in self.replica.buffers.items():
            if name in merged:
                buffer.copy_(merged[name])

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Position, and this rank's weights and anchors, from which a job of another size can start."""
        weights = {name: self.replica.live(name) for name in self.replica.parameters}
        return self._settled([]) | {"weights": weights}  # what is in flight is each rank's own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._donor = state["weights"]

    def after_resize(self) -> None:
        """Start from the weights of the first rank that saved."""
        assert self._donor is not None
        for name, value in self._donor.items():
            self.replica.write(name, value)
        if self._anchors is not None:
            self._anchors.read()
        self._donor = None

    def rank_state_dict(self) -> dict[str, Any]:
        """See :attr:`replica_state`. Waits for what is in flight."""
        for transfer in self._in_flight:
            self._wait(transfer)
        return {
            "anchors": None if self._anchors is None else self._anchors.state_dict(),
            "in_flight": [
                {
                    "unit": transfer.unit.index,
                    "number": transfer.number,
                    "apply_at": transfer.apply_at,
                    "values": transfer.values,
                    "finite": transfer.finite,
                    "skipped": transfer.skipped,
                }
                for transfer in self._in_flight
            ],
            "own": self.own_state(),
        }

    def load_rank_state_dict(self, state: Mapping[str, Any]) -> None:
        self._donor = None
        if self._anchors is not None:
            self._anchors.load_state_dict(state["anchors"])
        self._in_flight = deque(self._restored(one) for one in state["in_flight"])
        self.load_own_state(state["own"])

    def _restored(self, state: Mapping[str, Any]) -> Transfer:
        unit = self.units[state["unit"]]
        transfer = Transfer(unit, state["number"], state["apply_at"], dict(state["values"]))
        transfer.finite = state["finite"]
        transfer.roster = NOBODY if state["skipped"] else None
        return transfer

    # How it is done.

    def make_units(self) -> list[Unit]:
        return [Unit(0, tuple(self.replica.parameters))]  # buffers stay local

    @property
    def common_anchors(self) -> bool:
        return False

    def settings(self) -> dict[str, Any]:
        return {"wire_dtype": self.wire_dtype}

    @torch.no_grad()
    def finish(self) -> None:
        """Apply what is in flight and, if the options say so, merge."""
        self._finishing = True
        try:
            while self._in_flight:
                self.receive()
            if self.options.final_sync:
                self.merge()
        finally:
            self._finishing = False

    def roll_back(self, unit: Unit) -> None:
        """Without anchors, keep what there is: a later round may bring finite weights."""
        if self._anchors is not None:
            super().roll_back(unit)

    def settle_outcome(self) -> None:
        """Where ranks may be lost, rounds count for all or for none: those that are left have to stay in the same round,
        and a mean that some have mixed with a lost rank's and others without is nobody's."""
        if self.members is not None:
            self.members.settle_round(self._private_comm)

    def _open(self, private: Comm, alarm: Alarm | NoAlarm) -> None:
        self.peers = Peers(private, complete=self.members is not None)
        self.ranks = tuple(range(private.world_size))
        self.lay_out(self.ranks)
        super()._open(private, alarm)

    def report(self, transfer: Transfer, contributors: int) -> None:
        """Of how many ranks, itself included, the outcome is made."""
        transfer.stats = StepStats(
            step=transfer.number,
            dense_bytes=sum(x.numel() * x.element_size() for x in transfer.values.values()),
            num_contributors=contributors,
        )

    def live_values(self, unit: Unit) -> dict[str, Tensor]:
        """Copies of the weights in full precision."""
        return {name: full(self.replica.live(name)) for name in unit.parameters}

"""Gossip SGD: replicas mix their weights with those of a few neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..registry import spec
from ..types import Comm
from .decentralised import NOBODY, Decentralised, refusal_of
from .flat import WireDtype, flat, for_wire, parts
from .gossip_schedule import GossipSchedule
from .joining import Ranks
from .options import SyncOptions
from .peers import tag_of
from .topologies import Mixing, Neighbours, RandomPairs, Topology
from .transfer import Transfer
from .units import Unit

_MOST_STEPS = 32
_EVERY_ROUND = GossipSchedule(p_gossip=1.0)


class Gossip(Decentralised):
    """What mixing over a topology takes, whichever way weights are mixed.

    Args:
        topology: who meets whom.
        schedule: in which rounds; None is all.
        gossip_steps: Q, exchanges per round: errors of consensus shrink by the rate to the power of Q, bytes
            and latency grow by Q.

    Raises:
        ValueError: ``gossip_steps`` out of range. At the start: a topology that does not exist for so many
            ranks, or is not connected.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sync_every: int,
        topology: Topology,
        schedule: GossipSchedule | None,
        gossip_steps: int,
        wire_dtype: WireDtype,
        options: SyncOptions | None,
        process_group: Ranks,
        master_weights: Mapping[str, Tensor] | None,
    ) -> None:
        if not 1 <= gossip_steps <= _MOST_STEPS:
            raise ValueError(
                f"gossip_steps={gossip_steps} must be from 1 to {_MOST_STEPS}; use 1, or 4 on sparse graphs"
            )
        super().__init__(
            model,
            optimizer,
            sync_every=sync_every,
            wire_dtype=wire_dtype,
            options=options,
            process_group=process_group,
            master_weights=master_weights,
        )
        self.topology, self.gossip_steps = topology, gossip_steps
        self.schedule = _EVERY_ROUND if schedule is None else schedule
        self.mixing: Mixing | None = None

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "topology": spec(self.topology),
            "schedule": spec(self.schedule),
            "gossip_steps": self.gossip_steps,
        }

    def refusal(self, world_size: int) -> str:
        return refusal_of(lambda: self.check_mixing(self.topology.mixing(world_size)))

    def lay_out(self, ranks: tuple[int, ...]) -> None:
        """
        Raises:
            ValueError: a topology that does not exist for these ranks, or leaves them unconnected.
        """
        if self.mixing is None or len(ranks) == self.peers.comm.world_size:
            self.mixing = self.topology.mixing(len(ranks))
        else:
            self.mixing = self.mixing.without(set(self.mixing.ranks) - set(ranks))
        self.check_mixing(self.mixing)

    def check_mixing(self, mixing: Mixing) -> None:
        """
        Raises:
            ValueError: the method cannot work with it.
        """

    def plan(self, round_number: int, q: int) -> Neighbours:
        """This rank's part in gossip step ``q`` of a round."""
        assert self.mixing is not None
        step = round_number * self.gossip_steps + q
        return self.schedule.neighbours(self.mixing, self.peers.rank, round_number, step)

    def due(self) -> list[Unit]:
        units = super().due()
        # Where ranks may be lost all end a round together, who meets nobody in it too.
        if units and self.members is None and not self._takes_part():
            self.round += 1  # rounds are numbered alike on all ranks
            return []
        return units

    def _takes_part(self) -> bool:
        if self.schedule.mode(self.round) == "merge":
            return True
        plans = [self.plan(self.round, q) for q in range(self.gossip_steps)]
        return any(plan.sends or plan.receives for plan in plans)


class GossipSGD(Gossip):
    """Decentralised SGD (Lian et al. 2017) and its relatives: every ``sync_every`` inner steps
    ``x_i <- sum_j W_ij x_j`` with the topology's weights W.

    This is adapt-then-combine, which waits for the neighbours. With ``overlap`` it is combine-while-compute: the
    exchange runs during the next ``sync_every`` inner steps, and what they change is added to its outcome,
    ``x_i <- sum_j W_ij x_j + (what the steps changed)``. Momentum buffers stay local.

    Weights are mixed as ``x_i + sum_j W_ij (x'_j - x'_i)`` with x' as sent, so a message that does not arrive
    leaves its weight to oneself. Symmetric weights then still keep the mean; others let it drift a little:
    ``peers.missed`` counts such messages, the log names their senders.

    The mean of all replicas is the model to evaluate: :meth:`probe_merge`, and the merge at the end. A single
    replica looks worse. With ``sync_every=1`` each round sends (degree) P elements.

    State: none (with ``overlap`` 4 bytes per parameter in flight), and in an exchange 4 per neighbour.

    Args:
        model: as for :class:`~commkit.outer.OuterSync`.
        optimizer: the inner one. Its learning rate is as for averaging in each step; lower it if
            :meth:`consensus_distance` keeps growing.
        sync_every: H local steps between exchanges; 1 is the paper's.
        topology: None is random pairs, one message per round with a rate of mixing that does not fall with
            the number of ranks. "exponential" mixes faster for log2 W messages; "ring" and "torus" are for
            wires that are so.
        schedule: in which rounds to talk; None is all.
        gossip_steps: Q; see :class:`Gossip`. 1; 4 on sparse graphs with very different data (DFedSAM-MGS).
        overlap: hide the exchange behind the next steps. It takes more rounds to agree.
        wire_dtype: as for :class:`Decentralised`.
        options: as for :class:`~commkit.outer.OuterSync`.
        process_group: as for :class:`~commkit.outer.OuterSync`.
        master_weights: as for :class:`~commkit.outer.OuterSync`.

    Raises:
        ValueError: a value out of range. At the start: a topology whose weights do not keep the mean, which
            push-sum can use, that does not exist for so many ranks, or is not connected.
    """

    anchored = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sync_every: int = 1,
        topology: Topology | None = None,
        schedule: GossipSchedule | None = None,
        gossip_steps: int = 1,
        overlap: bool = False,
        wire_dtype: WireDtype = "fp32",
        options: SyncOptions | None = None,
        process_group: Ranks = None,
        master_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            sync_every=sync_every,
            topology=RandomPairs() if topology is None else topology,
            schedule=schedule,
            gossip_steps=gossip_steps,
            wire_dtype=wire_dtype,
            options=options,
            process_group=process_group,
            master_weights=master_weights,
        )
        self.overlap = overlap

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "overlap": self.overlap}

    def check_mixing(self, mixing: Mixing) -> None:
        if not mixing.doubly_stochastic:
            raise ValueError(
                f"topology={spec(self.topology)} has weights that do not keep the mean, on which gossip SGD "
                "relies; use PushSum, or an undirected graph"
            )

    def delay(self, unit: Unit) -> int:
        return self.sync_every if self.overlap else 0

    def snapshot(self, unit: Unit) -> dict[str, Tensor]:
        return self.live_values(unit)

    def carry_out(self, transfer: Transfer, comm: Comm) -> None:
        """Turn the weights of ``transfer`` into mixed ones; with overlap, into what mixing adds to them."""
        before, contributors = flat(transfer.values), set[int]()
        if self.schedule.mode(transfer.number) == "merge":
            x = self.peers.mean(before, include=transfer.finite)
            contributors = set(self.ranks) - self.peers.lost
        else:
            x, finite = before.clone(), transfer.finite
            for q in range(self.gossip_steps):
                x, finite, met = self._mixed(x, finite, transfer.number, q)
                contributors |= met
            if not finite:
                transfer.roster = NOBODY
        self.report(transfer, len(contributors | {self.peers.rank}))
        if self.overlap and transfer.finite:
            x.sub_(before)
        transfer.values = parts(x, transfer.values)

    def _mixed(self, x: Tensor, finite: bool, number: int, q: int) -> tuple[Tensor, bool, set[int]]:
        """The outcome of one gossip step, whether it is finite, and whose messages are in it."""
        plan = self.plan(number, q)
        message = for_wire(x, self.wire_dtype)
        arrived = self.peers.swap(message, plan.sends, plan.receives, tag_of(number, q))
        arrived = self.peers.finite(arrived)
        if not finite:
            # It knows nothing worth keeping: what its neighbours have takes its place.
            total = sum(plan.receives[peer] for peer in arrived)
            shares = [y.to(x.dtype) * (plan.receives[p] / total) for p, y in arrived.items()]
            return (torch.stack(shares).sum(0), True, set(arrived)) if shares else (x, False, set())
        own = message.to(x.dtype)
        out = x.clone()
        for peer, y in arrived.items():
            out.add_(y.to(x.dtype) - own, alpha=plan.receives[peer])
        return out, True, set(arrived)

    def apply(self, unit: Unit, mean: dict[str, Tensor]) -> None:
        # A replica that was not finite has nothing to add what mixing changes to.
        added = self.overlap and not self.was_reset
        for name, value in mean.items():
            live = self.replica.live(name)
            self.replica.write(name, live.to(value.dtype) + value if added else value)

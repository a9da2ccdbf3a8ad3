"""Stochastic gradient push: gossip over one-way links."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..registry import spec
from ..runtime.alarm import Alarm, NoAlarm
from ..types import Comm
from .flat import WireDtype, flat, for_wire, parts
from .gossip import Gossip
from .gossip_schedule import GossipSchedule
from .joining import Ranks
from .options import SyncOptions
from .peers import tag_of
from .topologies import Mixing, OnePeerExponential, Topology
from .transfer import Transfer
from .units import Unit

_log = logging.getLogger(__name__)
_LEAST_MASS = 1e-3


class PushSum(Gossip):
    """Stochastic gradient push (Assran et al. 2019). Each rank has a vector x and a mass w, and trains
    ``z = x / w``. Every ``sync_every`` inner steps, which moved z by d::

        x <- x + d;  x_i <- sum_j p_ij x_j;  w_i <- sum_j p_ij w_j

    where each rank deals itself and its peers shares p that add up to 1. That is all that is asked of a topology, so
    links may be one-way. ``sum(w)`` stays the number of ranks and ``sum(x)`` changes by training alone. A
    message that is lost takes x and w along, and the ratio stays right. Where ranks may be lost and others join, the
    first round of the new set scales all masses alike so that they add up to its size. A rank that is not finite goes back to its last
    round's z.

    A message is P elements and the mass, 8 bytes.

    State: 4 bytes per parameter (z after the last round; in host memory with ``options.offload``) and the mass.

    Args:
        model: as for :class:`~commkit.outer.OuterSync`; the weights are z.
        optimizer: the inner one.
        sync_every: H local steps between exchanges; 1 is the paper's.
        topology: None is "one_peer_exponential": one message per round, exact after log2 W rounds if W is
            a power of two. Any whose shares given add up to 1.
        schedule: in which rounds to talk; None is all.
        gossip_steps: Q exchanges per round.
        wire_dtype: as for :class:`Decentralised`; a rank keeps what rounding did not send.
        options: as for :class:`~commkit.outer.OuterSync`.
        process_group: as for :class:`~commkit.outer.OuterSync`.
        master_weights: as for :class:`~commkit.outer.OuterSync`.

    Attributes:
        w: this rank's mass.
        restarts: how often the mass fell below 1/1000, from where x / w is noise, and the rank took its
            peers' z and a mass of 1.

    Raises:
        ValueError: a value out of range. At the start: a topology whose shares given do not add up to 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sync_every: int = 1,
        topology: Topology | None = None,
        schedule: GossipSchedule | None = None,
        gossip_steps: int = 1,
        wire_dtype: WireDtype = "fp32",
        options: SyncOptions | None = None,
        process_group: Ranks = None,
        master_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            sync_every=sync_every,
            topology=OnePeerExponential() if topology is None else topology,
            schedule=schedule,
            gossip_steps=gossip_steps,
            wire_dtype=wire_dtype,
            options=options,
            process_group=process_group,
            master_weights=master_weights,
        )
        self.w = 1.0
        self.restarts = 0
        self._balanced = True  # the masses add up to the number of ranks
        self._outcome = 1.0, 0  # mass and restarts, if the round counts

    def check_mixing(self, mixing: Mixing) -> None:
        if not mixing.column_stochastic:
            raise ValueError(
                f"topology={spec(self.topology)}: the shares that a rank gives, itself included, must add up to 1"
            )

    def contribution(self, name: str) -> Tensor:
        """x: what this rank has of the sum, with its progress since the last round."""
        anchor = self.anchors.values[name].detach().to(self.replica.device)
        return (anchor * self.w).sub_(self.anchors.difference(name))

    def mass(self) -> float:
        return self.w

    def snapshot(self, unit: Unit) -> dict[str, Tensor]:
        return {name: self.contribution(name) for name in unit.parameters}

    def carry_out(self, transfer: Transfer, comm: Comm) -> None:
        """Turn the x of ``transfer`` into the new z."""
        like, number, restarts = transfer.values, transfer.number, 0
        w = self.w if self._balanced else self._mass_of_balance()
        if transfer.finite and w == self.w:
            x = flat(like)
        else:
            z = flat({n: self.anchors.values[n] for n in like}).to(self.replica.device)
            x = flat(like).add_(z, alpha=w - self.w) if transfer.finite else z * w
        contributors = {self.peers.rank}
        if self.schedule.mode(number) == "merge":
            total = self.peers.mean(torch.cat([x, x.new_tensor([w])]))
            x, w = total[:-1], float(total[-1])
            contributors |= set(self.ranks) - self.peers.lost
        else:
            for q in range(self.gossip_steps):
                x, w, restarted, met = self._pushed(x, w, number, q)
                contributors |= met
                restarts += restarted
        self.report(transfer, len(contributors))
        transfer.values = parts(x / w, like)
        self._outcome = w, restarts

    def _mass_of_balance(self) -> float:
        """This rank's mass, when all are scaled alike so that they add up to the number of ranks again. A lost rank took its
        own along, which would make what the others learn count for more or less; what they agree on stays."""
        own = torch.tensor([self.w], dtype=torch.float64, device=self.replica.device)
        masses = self.peers.gather(own)
        return self.w * len(masses) / sum(map(float, masses.values()))

    def _pushed(
        self, x: Tensor, mass: float, number: int, q: int
    ) -> tuple[Tensor, float, bool, set[int]]:
        """x and mass after one gossip step, whether they are those of the peers alone, and whose messages are in them."""
        plan = self.plan(number, q)
        sent, w = for_wire(x, self.wire_dtype), mass
        message = torch.cat(
            [_bytes(sent), _bytes(torch.tensor([mass], dtype=torch.float64, device=x.device))]
        )
        arrived = self.peers.swap(message, plan.sends, plan.receives, tag_of(number, q))
        out, sent_x = x.clone(), sent.to(x.dtype)
        for peer, share in plan.sends.items():
            if peer not in self.peers.lost:
                out.sub_(sent_x, alpha=share)
                w -= share * mass
        received, received_mass = torch.zeros_like(x), 0.0
        taken = set()
        for peer, buffer in arrived.items():
            y, their_mass = (
                buffer[:-8].view(sent.dtype),
                float(buffer[-8:].clone().view(torch.float64)),
            )
            if not bool(y.isfinite().all()):
                self.peers.suspect(peer)
                continue
            taken.add(peer)
            received.add_(y.to(x.dtype), alpha=plan.receives[peer])
            received_mass += plan.receives[peer] * their_mass
        out += received
        w += received_mass
        restarts = w < _LEAST_MASS and received_mass > 0
        if restarts:
            _log.warning("rank %d: mass %.1e is too little; restart from peers", self.peers.rank, w)
            out, w = received / received_mass, 1.0
        return out, w, restarts, taken

    def apply(self, unit: Unit, mean: dict[str, Tensor]) -> None:
        self.w, restarts = self._outcome
        self.restarts += restarts
        self._balanced = True
        for name, z in mean.items():
            self.anchors.values[name].copy_(z)
        self.anchors.write_back(unit.parameters)

    def _open(self, private: Comm, alarm: Alarm | NoAlarm) -> None:
        super()._open(private, alarm)
        self._balanced = self.members is None

    def own_state(self) -> dict[str, Any]:
        return {"w": self.w}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        self.w = state["w"]

    def after_resize(self) -> None:
        super().after_resize()
        self.w = 1.0

    def _write_merged(self, merged: Mapping[str, Tensor], anchor: bool = True) -> None:
        super()._write_merged(merged, anchor)
        if anchor:
            self.w = 1.0


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)

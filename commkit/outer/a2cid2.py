"""A2CiD2: gossip in pairs with continuous momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..registry import spec
from ..types import Comm
from .acid import AD_PSGD, AcidCoefficients, AcidState
from .decentralised import NOBODY, Decentralised, refusal_of
from .flat import WireDtype, flat, for_wire, parts
from .joining import Ranks
from .matching import draw_pairs, meeting_rates
from .options import SyncOptions
from .peers import tag_of
from .topologies import Mixing, Ring, Topology
from .transfer import Transfer
from .units import Unit


class A2CiD2(Decentralised):
    """A2CiD2 (Nabli, Belilovsky and Oyallon 2023) in rounds: each rank has a second copy x~ of its weights, which
    mixes with them as time passes and so carries momentum between meetings. On poorly connected graphs that is
    worth about twice the communication.

    An inner step takes time 1: mix, then move x and x~ alike. After every ``sync_every`` steps the pairs of the
    round meet, at equal times on both sides::

        D = x_i - x_j;  x_i <- x_i - D/2;  x~_i <- x~_i - alpha D

    with coefficients from how often which pair meets. ``sum(x + x~)`` changes by training alone. Pairs are drawn
    among the topology's links, each rank in one at most; who has none, or a lost or non-finite partner, sits out.

    State: 4 bytes per parameter (x~), and in an exchange 8. A round sends P elements.

    Args:
        model: as for :class:`~commkit.outer.OuterSync`.
        optimizer: the inner one; what it changes is added to x~ too, momentum and all.
        sync_every: H inner steps between meetings; 1. Less often asks for more of this method.
        topology: None is "ring", where it gains most. On a complete graph there is nothing to accelerate.
        coefficients: None takes them from the rates of meeting; ``AD_PSGD`` turns the momentum off.
        seed: of the pairs; equal on every rank.
        wire_dtype: as for :class:`Decentralised`.
        options: as for :class:`~commkit.outer.OuterSync`.
        process_group: as for :class:`~commkit.outer.OuterSync`.
        master_weights: as for :class:`~commkit.outer.OuterSync`.

    Raises:
        ValueError: ``sync_every`` below 1. At the start: a topology that is not symmetric, does not exist for
            so many ranks, or is not connected.
    """

    anchored = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sync_every: int = 1,
        topology: Topology | None = None,
        coefficients: AcidCoefficients | None = None,
        seed: int = 0,
        wire_dtype: WireDtype = "fp32",
        options: SyncOptions | None = None,
        process_group: Ranks = None,
        master_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            sync_every=sync_every,
            wire_dtype=wire_dtype,
            options=options,
            process_group=process_group,
            master_weights=master_weights,
        )
        self.topology, self.seed = Ring() if topology is None else topology, seed
        self._given = coefficients
        self.mixing: Mixing | None = None
        self.acid: AcidState | None = None
        self._stepping = False

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "topology": spec(self.topology),
            "coefficients": spec(self._given),
            "seed": self.seed,
        }

    def refusal(self, world_size: int) -> str:
        return refusal_of(lambda: self._check(self.topology.mixing(world_size)))

    def lay_out(self, ranks: tuple[int, ...]) -> None:
        """
        Raises:
            ValueError: a topology that is not symmetric, does not exist for these ranks, or leaves them unconnected.
        """
        if self.mixing is None or len(ranks) == self.peers.comm.world_size:
            self.mixing = self.topology.mixing(len(ranks))
        else:
            self.mixing = self.mixing.without(set(self.mixing.ranks) - set(ranks))
        self._check(self.mixing)
        coefficients = self._given or _of(self.mixing, self.seed, self.sync_every)
        if self.acid is None:
            live = [self.replica.live(name) for name in self.replica.parameters]
            self.acid = AcidState(live, coefficients)
        self.acid.coefficients = coefficients

    def _check(self, mixing: Mixing) -> None:
        if not mixing.symmetric:
            raise ValueError(
                f"topology={spec(self.topology)} has one-way links, and a meeting takes two; use an undirected one"
            )

    # An inner step: mix, and let x~ move as x does.

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        super()._before_step(optimizer, args, kwargs)
        self._mix()
        self._move_copies(-1)
        self._stepping = True

    @torch.no_grad()
    def after_step(self) -> None:
        if self._stepping:
            self._move_copies(1)
            self._stepping = False
        else:  # a step that the optimizer did not see, in which time passed all the same
            self._mix()
        super().after_step()

    def _mix(self) -> None:
        self._state.mix(1.0)
        self.replica.show_masters()

    def _move_copies(self, sign: int) -> None:
        for copy, x in zip(self._state.copies, self._state.params, strict=True):
            copy.add_(x, alpha=sign)

    # A meeting.

    def snapshot(self, unit: Unit) -> dict[str, Tensor]:
        return self.live_values(unit)

    def carry_out(self, transfer: Transfer, comm: Comm) -> None:
        """Turn the weights of ``transfer`` into those to meet: the partner's, or one's own."""
        assert self.mixing is not None
        x = flat(transfer.values)
        partner = draw_pairs(self.mixing, self.seed, transfer.number).get(self.peers.rank)
        met = [] if partner is None else [partner]
        message = for_wire(x, self.wire_dtype)
        arrived = self.peers.finite(self.peers.swap(message, met, met, tag_of(transfer.number)))
        self.report(transfer, len(arrived) + transfer.finite)
        if not transfer.finite and not arrived:
            transfer.roster = NOBODY
        for theirs in arrived.values():
            other = theirs.to(x.dtype)
            # D is of what both have sent, so that it has the same size on both sides.
            exact = not transfer.finite or message.dtype == x.dtype
            x = other if exact else x - (message.to(x.dtype) - other)
        transfer.values = parts(x, transfer.values)

    def apply(self, unit: Unit, mean: dict[str, Tensor]) -> None:
        if self.was_reset:
            self._start_at(mean)
        else:
            self._state.meet(list(mean.values()))
        self.replica.show_masters()

    def _start_at(self, weights: Mapping[str, Tensor]) -> None:
        """Both copies become ``weights``."""
        for (name, value), copy in zip(weights.items(), self._state.copies, strict=True):
            self.replica.write(name, value)
            copy.copy_(value)

    def _write_merged(self, merged: Mapping[str, Tensor], anchor: bool = True) -> None:
        super()._write_merged(merged, anchor)
        if anchor:
            self._start_at({name: merged[name] for name in self.replica.parameters})

    # State.

    @property
    def _state(self) -> AcidState:
        assert self.acid is not None
        return self.acid

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.members is not None:  # who joins begins with another's weights
            self._start_at(state["weights"])

    def own_state(self) -> dict[str, Any]:
        return {"copies": self._state.state_dict()}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        self._state.load_state_dict(state["copies"])

    def after_resize(self) -> None:
        super().after_resize()
        self._start_at({name: self.replica.live(name) for name in self.replica.parameters})


def _of(mixing: Mixing, seed: int, sync_every: int) -> AcidCoefficients:
    """Of the meetings that will take place; a rank alone has none."""
    if len(mixing.ranks) < 2:
        return AD_PSGD
    return AcidCoefficients.of(meeting_rates(mixing, seed) / sync_every)

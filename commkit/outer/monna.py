"""MoNNA: training among ranks some of which may send anything, without a server that is trusted."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..aggregators.robust_rules import check_num_faulty, decide
from ..types import Comm, NonFiniteError
from .decentralised import NOBODY, Decentralised, refusal_of
from .flat import WireDtype, flat, for_wire, parts
from .joining import Ranks
from .options import SyncOptions
from .peers import tag_of
from .transfer import Transfer
from .units import Unit


class MoNNA(Decentralised):
    """MoNNA (Farhadkhani et al. 2023): of n ranks up to ``num_faulty`` may be faulty or hostile.

    Each inner step is taken along a momentum of this rank's own gradients, ``m <- momentum m + (1 - momentum) g``,
    which takes the place of ``p.grad`` before the inner optimizer steps. Then everybody's weights go to
    everybody, and each rank takes the mean of the n - f vectors nearest to its own, its own included. Distances
    are over the whole model. A vector with an inf or NaN is infinitely far. Of r vectors that arrive, r - f
    are taken: a dead rank does not use up the allowance for liars.

    Replicas of honest ranks stay near each other, not equal. The merge at the end would be a plain mean that
    the faulty could steer, so unlike other methods there is none: the end of the ``with`` block leaves replicas
    as they are, and :meth:`merge` is refused. Every honest replica is a result.

    State: 4 bytes per parameter (momentum), and 4 n during a round. A round sends P elements to each of n - 1.
    Arithmetic is O(n P).

    Args:
        model: as for :class:`~commkit.outer.OuterSync`.
        optimizer: the inner one, without momentum of its own: plain SGD.
        num_faulty: f. n >= 3f + 1 is required, below 5f + 1 a warning says that an attacker who knows all may slow
            training down.
        momentum: 0.99 in the paper; it is what tells an attack from noise, so not much less. 0 leaves
            gradients alone, and any inner optimizer may be used.
        sync_every: H inner steps between rounds; the paper's 1. More steps spread honest replicas, among
            which attackers hide.
        wire_dtype: "bf16" halves the bytes.
        options: as for :class:`~commkit.outer.OuterSync`. In ``warmup_steps`` gradients are averaged plainly,
            so there must be none if faults are feared from the start.
        process_group: as for :class:`~commkit.outer.OuterSync`.
        master_weights: as for :class:`~commkit.outer.OuterSync`.

    Raises:
        ValueError: ``momentum`` outside [0, 1), an inner optimizer with momentum of its own, ``num_faulty``
            below 0. At the start: too many faulty for the number of ranks.
    """

    anchored = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        num_faulty: int,
        momentum: float = 0.99,
        sync_every: int = 1,
        wire_dtype: WireDtype = "fp32",
        options: SyncOptions | None = None,
        process_group: Ranks = None,
        master_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must be in [0, 1); use 0.99")
        if num_faulty < 0:
            raise ValueError(f"num_faulty={num_faulty} must be >= 0; use for example 1")
        if momentum and any(
            group.get("momentum") or "betas" in group for group in optimizer.param_groups
        ):
            raise ValueError(
                f"{type(optimizer).__name__} has momentum of its own, under MoNNA's momentum={momentum}; give it "
                "torch.optim.SGD(..., momentum=0), or use momentum=0 here"
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
        self.num_faulty, self.momentum = num_faulty, momentum
        self._momentum: dict[str, Tensor] = {}

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "num_faulty": self.num_faulty, "momentum": self.momentum}

    def refusal(self, world_size: int) -> str:
        return refusal_of(lambda: self._check(world_size))

    def lay_out(self, ranks: tuple[int, ...]) -> None:
        """
        Raises:
            ValueError: too many faulty for so many ranks.
        """
        self._check(len(ranks))

    def _check(self, world_size: int) -> None:
        check_num_faulty("nearest", world_size, self.num_faulty)

    # The momentum.

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        super()._before_step(optimizer, args, kwargs)
        if not self.momentum:
            return
        for name, p in self.replica.parameters.items():
            g = torch.zeros_like(p) if p.grad is None else p.grad
            if name not in self._momentum:
                self._momentum[name] = torch.zeros_like(
                    p, dtype=torch.promote_types(p.dtype, torch.float32)
                )
            m = self._momentum[name]
            m.mul_(self.momentum).add_(g.to(m.dtype), alpha=1 - self.momentum)
            if p.grad is None:
                p.grad = m.to(p.dtype, copy=True)
            else:
                p.grad.copy_(m)

    # A round.

    def snapshot(self, unit: Unit) -> dict[str, Tensor]:
        return self.live_values(unit)

    def carry_out(self, transfer: Transfer, comm: Comm) -> None:
        """Turn the weights of ``transfer`` into the mean of the nearest."""
        x, rank = flat(transfer.values), self.peers.rank
        message = for_wire(x, self.wire_dtype)
        others = [peer for peer in self.ranks if peer != rank]
        arrived = self.peers.swap(message, others, others, tag_of(transfer.number))
        vectors = dict(sorted({**arrived, rank: x}.items()))
        rows = [vector.to(x.dtype) for vector in vectors.values()]
        stack = functools.partial(torch.stack, rows)
        for peer, vector in arrived.items():
            if not bool(vector.isfinite().all()):
                self.peers.suspect(peer)
        try:
            verdict = decide([stack], "nearest", self.num_faulty, list(vectors).index(rank))
        except NonFiniteError:
            transfer.roster = NOBODY
            return
        self.report(transfer, len(verdict.members))
        transfer.values = parts(verdict.combine(stack()), transfer.values)

    def apply(self, unit: Unit, mean: dict[str, Tensor]) -> None:
        if self.was_reset:
            self._momentum.clear()
        for name, value in mean.items():
            self.replica.write(name, value)

    # What a faulty rank could steer.

    def finish(self) -> None:
        """Nothing is in flight, and nothing is merged."""

    def _merged(self) -> dict[str, Tensor]:
        raise RuntimeError(
            "a plain mean of replicas could be steered by the faulty ones; take an honest replica as it is"
        )

    # State.

    def own_state(self) -> dict[str, Any]:
        return {"momentum": dict(self._momentum)}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        self._momentum = {name: m.clone() for name, m in state["momentum"].items()}

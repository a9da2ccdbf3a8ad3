"""DFedSAM: gossip between replicas whose local steps look for flat minima."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .flat import WireDtype
from .gossip import GossipSGD
from .gossip_schedule import GossipSchedule
from .joining import Ranks
from .options import SyncOptions
from .sam import check_rho, sharpness_aware
from .topologies import StaticExponential, Topology


class DFedSAM(GossipSGD):
    """DFedSAM-MGS (Shi et al. 2023): sharpness-aware local steps, then several gossip steps in a row.

    Each inner step takes its gradient at ``x + rho g / ||g||``, which keeps replicas with very different data in flat
    places where their mean is good, too. Every ``sync_every`` steps weights are mixed ``gossip_steps`` times,
    ``X <- W^Q X``: replicas come closer by the topology's rate to the power of Q, at Q times the bytes and latency.
    With ``gossip_steps=1`` it is DFedSAM, with ``rho=0`` gossip SGD.

    It evaluates a batch twice, so the optimizer's step needs a closure, as LBFGS does::

        def closure():
            optimizer.zero_grad()
            loss = model(batch)
            loss.backward()
            return loss

        loss = optimizer.step(closure)

    A step whose gradients are not finite is left out on that replica. A GradScaler takes no closure: train in bf16.

    State: none; 4 bytes per parameter during a step, and in an exchange 4 per neighbour. Arithmetic is doubled.

    Args:
        model: as for :class:`~commkit.outer.OuterSync`, not sharded.
        optimizer: the inner one; the paper uses SGD at 0.1, decayed by 0.998 per round.
        sync_every: local steps between exchanges; the paper's are five epochs.
        rho: how far to look, 0.01 to 0.05. Larger flattens more and learns slower.
        topology: None is the exponential graph. DFedSAM is made for sparse graphs and very different data; where
            links are good, gossip SGD does as well for half the arithmetic.
        schedule: in which rounds to talk; None is all.
        gossip_steps: Q; 4 is the paper's, 1 to save bytes. On the one-peer exponential graph log2 W give the exact
            mean.
        wire_dtype: as for :class:`GossipSGD`.
        options: as for :class:`~commkit.outer.OuterSync`.
        process_group: as for :class:`~commkit.outer.OuterSync`.
        master_weights: as for :class:`~commkit.outer.OuterSync`.

    Attributes:
        skipped_steps: inner steps that were left out here.

    Raises:
        ValueError: ``rho`` negative or not finite, a sharded model, or what :class:`GossipSGD` refuses. At a step:
            without a closure.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sync_every: int = 16,
        rho: float = 0.05,
        topology: Topology | None = None,
        schedule: GossipSchedule | None = None,
        gossip_steps: int = 4,
        wire_dtype: WireDtype = "fp32",
        options: SyncOptions | None = None,
        process_group: Ranks = None,
        master_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_rho(rho)
        super().__init__(
            model,
            optimizer,
            sync_every=sync_every,
            topology=StaticExponential() if topology is None else topology,
            schedule=schedule,
            gossip_steps=gossip_steps,
            wire_dtype=wire_dtype,
            options=options,
            process_group=process_group,
            master_weights=master_weights,
        )
        if self.replica.shard_group is not None:
            raise ValueError(
                "DFedSAM moves all weights by one common length, and this replica's are sharded; give it a plain module, "
                "or use GossipSGD"
            )
        self.rho = rho
        self.skipped_steps = 0

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "rho": self.rho}

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        """The loss where the weights are, and in ``.grad`` the gradient a little uphill; no gradients at all, which
        makes optimizers step over the parameters, where they are not finite."""
        parameters = list(self.replica.parameters.values())
        loss, finite = sharpness_aware(parameters, closure, self.rho)
        if not finite:
            self.skipped_steps += 1
            for p in parameters:
                p.grad = None
        return loss

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        given = len(args) > 1 or kwargs.get("closure") is not None
        if not given and self.rho > 0:
            raise ValueError(
                f"DFedSAM with rho={self.rho} evaluates each batch twice: call optimizer.step(closure), whose closure "
                "clears the gradients, runs forward and backward and returns the loss; or use rho=0"
            )
        return super()._on_step(optimizer, args, kwargs)

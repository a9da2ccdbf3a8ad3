"""Schemes against stragglers, complete but for models and ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import nn
from torch.optim import Optimizer

from ..transport import MPINetwork, Network, TorchNetwork
from .coordinator import Coordinator
from .methods import Method
from .options import CoordinationOptions
from .worker import Worker

TransportName: TypeAlias = Literal["torch", "mpi"]


@dataclass(frozen=True)
class StragglerScheme:
    """A method still without models: :meth:`coordinate` on the ranks of ``options.coordinators``, :meth:`work` on the
    others.

    Args:
        method: what to do about stragglers.
        options: of all ranks.
        transport: "torch": point to point over torch.distributed, on gloo. "mpi": over mpi4py, for ranks that
            mpirun has started, which need no torch.distributed then.
        braking: rho of :class:`~commkit.optim.AdaptiveBrakingSGD`, if whoever makes the optimizer is to use it; None:
            any optimizer.
        seed: base of shared randomness.
    """

    method: Method
    options: CoordinationOptions = field(default_factory=CoordinationOptions)
    transport: TransportName = "torch"
    braking: float | None = None
    seed: int = 0

    def network(self) -> Network:
        """The ranks of this run.

        Raises:
            RuntimeError: torch.distributed is not initialised.
            ModuleNotFoundError: mpi4py is missing.
        """
        return MPINetwork() if self.transport == "mpi" else TorchNetwork()

    def coordinate(
        self,
        models: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
        *,
        batch: int,
        max_grad_norm: float = 0.0,
        before_step: Callable[[int, int], None] | None = None,
        network: Network | None = None,
    ) -> Coordinator:
        """The arguments are those of :class:`Coordinator`."""
        return Coordinator(
            models,
            optimizers,
            self.method,
            self._options(),
            batch=batch,
            max_grad_norm=max_grad_norm,
            before_step=before_step,
            network=self.network() if network is None else network,
        )

    def work(
        self,
        model: nn.Module,
        *,
        batch: int,
        network: Network | None = None,
        on_save: Callable[[int], None] | None = None,
    ) -> Worker:
        """The arguments are those of :class:`Worker`."""
        return Worker(
            model,
            self.method,
            self._options(),
            batch=batch,
            network=self.network() if network is None else network,
            on_save=on_save,
        )

    def _options(self) -> CoordinationOptions:
        return dataclasses.replace(self.options, seed=self.options.seed or self.seed)

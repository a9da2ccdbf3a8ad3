"""Lightning: what is common to the ``lightning`` and ``pytorch_lightning`` packages, without importing either."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..checkpoint import CheckpointError
from ..outer import AdLoCo, OuterScheme
from ..schemes import Scheme
from .ddp import DeferredHandle, ddp_hook
from .frameworks import Attachment, Requirement, Totals, connect, contents_of
from .frameworks.connect import made_of
from .frameworks.gathered import gather, restore

_REMEDY = "use Trainer(strategy=commkit.lightning.LocalUpdatesStrategy())"


class SchemeCallback:
    """Trains with ``scheme``: attaches when Lightning has wrapped the model, saves and restores the scheme's state with
    Lightning's checkpoints, and logs what it sends.

    - A scheme that reduces gradients wants ``strategy="ddp"``, on any device; with ``ModelParallelStrategy``, the schemes
      for sharded models, and with ``mesh`` all others between replicas.
    - An optimizer that communicates is returned by ``configure_optimizers``; leave ``scheme`` out.
    - One with local updates wants :class:`LocalUpdatesStrategy`.

    A checkpoint holds the state of all ranks, so rank 0 needs that much host memory while it is written. Resumed with as
    many ranks, training goes on bit for bit; with others, as ``on_resize`` says. Logged are the keys of
    :class:`~commkit.adapters.frameworks.record.Totals`.

    Args:
        scheme: as for :func:`commkit.attach`; the state of :func:`ddp_comm`, of which this then takes care; or None if
            the optimizer is one of ``commkit.optim``.
        mesh: the whole mesh of a sharded model with replicas, asked for when training begins.
        log: whether to log.
        on_resize: "mean" or "error".
        timeout_s: seconds after which a stuck reduction raises on all ranks.
        knobs: fields of the scheme.

    Attributes:
        handle: the attachment, from ``on_fit_start`` on.

    Raises:
        ConfigError: unknown scheme or field, or a value out of range.
        RuntimeError: when training begins: a version of Lightning outside the range, another communication hook, or a
            DDP underneath local updates.
        TypeError: likewise: no process group, several optimizers, or a scheme that the strategy cannot serve.
    """

    requirement: ClassVar[Requirement]

    def __init__(
        self,
        scheme: Scheme | OuterScheme | DeferredHandle | None = None,
        *,
        mesh: Callable[[], DeviceMesh] | None = None,
        log: bool = True,
        on_resize: Literal["mean", "error"] = "mean",
        timeout_s: float = 1800.0,
        **knobs: Any,
    ) -> None:
        if on_resize not in ("mean", "error"):
            raise ValueError(f"on_resize={on_resize!r} must be 'mean' or 'error'")
        pair = scheme if isinstance(scheme, DeferredHandle) else None
        if pair is not None:
            if knobs:
                raise TypeError(
                    f"knobs {sorted(knobs)} belong into ddp_comm(), which made this state"
                )
            scheme, knobs, timeout_s = pair.scheme, pair.knobs, pair.timeout_s
        self._pair = pair
        made = made_of(scheme, knobs)
        if isinstance(made, OuterScheme) and issubclass(made.method, AdLoCo):
            raise TypeError(
                "AdLoCo sets the number of micro-batches of each step, which Lightning does itself; use commkit.attach in "
                "a loop of your own, or another scheme"
            )
        self._local = isinstance(made, OuterScheme)
        self._scheme: Any = scheme
        self._knobs, self._mesh = knobs, mesh
        self._log, self._on_resize, self._timeout_s = log, on_resize, timeout_s
        self.handle: Attachment | None = None
        self._optimizer: Optimizer | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._device = torch.device("cpu")
        self._totals = Totals()
        self._counted = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Model and optimizers are set up, and the optimizers' state is not yet restored."""
        self.requirement.check()
        strategy = trainer.strategy
        self._device = strategy.root_device
        self._optimizer = _only(trainer.optimizers)
        model = self._model_of(strategy, pl_module)
        self._check(strategy, model, pl_module)
        self._totals, self._counted = Totals(), trainer.global_step
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if self._pair is not None and getattr(
            model, "_comm_hooks", None
        ):  # Lightning has registered it
            self.handle = self._pair.attach(model, scaler)
            return
        self.handle = connect(
            model,
            self._scheme,
            self._optimizer,
            remedy=_REMEDY,
            knobs=self._knobs,
            mesh=None if self._mesh is None else self._mesh(),
            grad_scaler=scaler,
            timeout_s=self._timeout_s,
        )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Everything else is restored: now what ranks have of their own."""
        if self._loaded is None and trainer.ckpt_path is not None:
            raise CheckpointError(
                f"{str(trainer.ckpt_path)!r} was saved without {type(self).__name__}, so there is no state of the scheme "
                "to go on from; load its weights into the module and train without ckpt_path, or leave the callback out"
            )
        if self._loaded is not None:
            assert self.handle is not None
            restore(contents_of(self.handle, self._optimizer), self._loaded, self._on_resize)
            self._loaded = None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.handle is None or trainer.global_step == self._counted:
            return  # gradients are being accumulated
        self._counted = trainer.global_step
        self._totals.add(self.handle)
        if self._log:
            pl_module.log_dict(self._totals.record(), on_step=True, on_epoch=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.handle is not None:
            self.handle.close()

    def state_dict(self) -> dict[str, Any]:
        """Lightning asks all ranks, and writes what rank 0 answers."""
        if self.handle is None:
            return {}
        return gather(contents_of(self.handle, self._optimizer), self._device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning calls it before there is a wrapped model; it is put in place in :meth:`on_train_start`."""
        self._loaded = state_dict

    @property
    def _wanted(self) -> str:
        return _REMEDY if self._local else "use Trainer(strategy='ddp')"

    def _model_of(self, strategy: Any, pl_module: nn.Module) -> Any:
        model = strategy.model
        if isinstance(model, DistributedDataParallel | FullyShardedDataParallel):
            return model
        if not torch.distributed.is_initialized():
            raise TypeError(
                f"{type(strategy).__name__} has no process group, so there is nobody to reduce with; "
                f"{self._wanted}"
            )
        if model is not pl_module:
            raise TypeError(
                f"{type(strategy).__name__} wraps the module in {type(model).__name__}, which sends gradients by itself; "
                f"{self._wanted}"
            )
        return _sharded_root(pl_module) or pl_module

    def _check(self, strategy: Any, model: nn.Module, pl_module: Any) -> None:
        hook = getattr(strategy, "_ddp_comm_hook", None)  # on CPUs Lightning ignores it
        if hook is not None and self._pair is None:
            raise RuntimeError(
                f"DDPStrategy has ddp_comm_hook={getattr(hook, '__qualname__', hook)}, and DDP takes one hook only; leave it "
                f"out, or, if it is commkit's, give its state to {type(self).__name__}(state)"
            )
        wrapped = isinstance(model, DistributedDataParallel | FullyShardedDataParallel | FSDPModule)
        if not wrapped and not self._local and pl_module.automatic_optimization:
            raise TypeError(
                f"{type(strategy).__name__} leaves the model as it is, where gradients could be reduced between backward "
                f"and step only, and Lightning runs backward inside the step; {self._wanted}"
            )


class LocalUpdatesMixin:
    """``DDPStrategy`` without the DDP: processes, devices, samplers and reductions of metrics are its own, and replicas
    train alone. For :class:`SchemeCallback` with a scheme such as DiLoCo, which alone synchronises them.

    Raises:
        TypeError: arguments of DDP, which there is none of.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        options = [*getattr(self, "_ddp_kwargs", {})]
        options += [n for n in kwargs if n.startswith("ddp_comm") or n == "model_averaging_period"]
        if options:
            raise TypeError(
                f"{type(self).__name__} wraps the model in no DDP, so {sorted(options)} have no effect; leave them out"
            )

    def configure_ddp(self) -> None:
        """The model stays as it is."""


def ddp_comm(
    scheme: Scheme, *, timeout_s: float = 1800.0, **knobs: Any
) -> tuple[DeferredHandle, Callable[..., Any]]:
    """The pair for ``DDPStrategy(ddp_comm_state=state, ddp_comm_hook=hook)``; it attaches at the first backward pass.

    Lightning registers hooks on GPUs only and says nothing elsewhere: give the state to ``CommkitCallback(state)``, which
    works everywhere and saves it too.

    Args:
        scheme: one that reduces gradients, as for :func:`commkit.attach`.
        timeout_s: as for :func:`commkit.attach`.
        knobs: fields of the scheme.

    Raises:
        ConfigError: unknown scheme or field, or a value out of range.
        TypeError: a scheme that does not reduce gradients.
    """
    return DeferredHandle(scheme, knobs, timeout_s), ddp_hook


def _only(optimizers: list[Optimizer]) -> Optimizer:
    if len(optimizers) != 1:
        names = [type(o).__name__ for o in optimizers]
        raise TypeError(
            f"configure_optimizers gave {names}, and a scheme follows the steps of one optimizer; give exactly one, with "
            "parameter groups"
        )
    return optimizers[0]


def _sharded_root(module: nn.Module) -> nn.Module | None:
    """What ``fully_shard`` was called on last: the module, or its one sharded child."""
    if isinstance(module, FSDPModule):
        return module
    roots = [child for child in map(_sharded_root, module.children()) if child is not None]
    if len(roots) > 1:
        raise TypeError(
            f"{len(roots)} parts of {type(module).__name__} are sharded apart; call fully_shard on what holds them all, last"
        )
    return roots[0] if roots else None

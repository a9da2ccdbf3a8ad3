"""Accelerate: a ``DistributedDataParallelKwargs`` that brings a scheme, and checkpoints of it.

No ``from __future__ import annotations`` here, as in :mod:`.ddp`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .. import checkpoint
from ..comm import new_group_like, require_group
from ..outer import OuterScheme
from ..schemes import Scheme
from .attach import refuse_double_momentum
from .ddp import Handle
from .frameworks import Attachment, connect, contents_of
from .frameworks.connect import check_one_scheme, made_of
from .frameworks.versions import ACCELERATE
from .loss_scale import GradScaler

_DIRECTORY = "commkit"
_HOOK_FIELDS = ("comm_hook", "comm_wrapper", "comm_state_option")
_FIELDS = tuple(
    f.name for f in dataclasses.fields(DistributedDataParallelKwargs) if f.name not in _HOOK_FIELDS
)
_REMEDY = "give the scheme to Accelerator(kwargs_handlers=[SchemeKwargs(scheme=...)]), which keeps each replica's DDP to itself"


@dataclasses.dataclass
class SchemeKwargs(DistributedDataParallelKwargs):  # type: ignore[misc]
    """DDP's arguments, and the scheme that reduces its gradients: ``Accelerator(kwargs_handlers=[...])``.

    A scheme that reduces gradients is attached when ``accelerator.prepare`` wraps the model. For one with local updates
    ``prepare`` puts each replica into a DDP of its own, which sends nothing. Call :meth:`attach` after ``prepare``: it
    attaches what needs the optimizer, and makes ``save_state`` and ``load_state`` include the scheme's state.

    Args:
        scheme: a name, a mapping ``{"name": ..., field: value}``, a path to a YAML file or a Reducer; None if the
            optimizer is one of ``commkit.optim``.
        timeout_s: seconds after which a stuck reduction raises on all ranks.
        on_resize: what ``load_state`` does with residuals of another number of ranks: "mean" or "error".

    The other fields are DDP's; ``comm_hook`` and ``comm_wrapper`` are refused.

    Attributes:
        handle: the attachment, once there is one.

    Raises:
        ConfigError: unknown scheme or field, or a value out of range.
        RuntimeError: a version of Accelerate outside the range.
        ValueError: ``comm_hook`` or ``comm_wrapper`` given too.
    """

    scheme: Scheme | OuterScheme | None = None
    timeout_s: float = 1800.0
    on_resize: str = "mean"

    def __post_init__(self) -> None:
        ACCELERATE.check()
        for name in ("comm_hook", "comm_wrapper"):
            value = getattr(self, name)
            if value != DDPCommunicationHookType.NO:
                raise ValueError(
                    f"{name}={value} and scheme={self.scheme!r} both want DDP's one communication hook; leave {name} out"
                )
        if self.on_resize not in ("mean", "error"):
            raise ValueError(f"on_resize={self.on_resize!r} must be 'mean' or 'error'")
        self._made = made_of(self.scheme)
        self.handle: Attachment | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Accelerate looks handlers up by their exact class."""
        return DistributedDataParallelKwargs

    @classmethod
    def like(cls, handler: DistributedDataParallelKwargs | None, **fields: Any) -> "SchemeKwargs":
        """With the DDP fields of ``handler``, and ``fields`` of its own."""
        given = {} if handler is None else {name: getattr(handler, name) for name in _FIELDS}
        return cls(**given, **fields)

    @property
    def local_updates(self) -> bool:
        """Whether replicas train alone."""
        return isinstance(self._made, OuterScheme)

    def to_dict(self, ignore_keys: tuple[str, ...] = _HOOK_FIELDS) -> dict[str, Any]:
        """DDP's own fields."""
        return {name: getattr(self, name) for name in _FIELDS if name not in ignore_keys}

    def to_kwargs(self) -> dict[str, Any]:
        """What DDP is called with: fields that are not its defaults."""
        kwargs: dict[str, Any] = super().to_kwargs()
        if self.local_updates:
            world = require_group(None)
            kwargs["process_group"] = new_group_like(world, None, ranks=[world.rank()])
        return kwargs

    def register_comm_hook(self, model: DistributedDataParallel) -> None:
        """Called by Accelerate as soon as ``model`` is wrapped. Collective."""
        if self.handle is not None:
            raise RuntimeError(
                "SchemeKwargs serves one model, and this is the second that Accelerate has wrapped; call commkit.attach "
                "on the DDP modules of several, each with a scheme of its own"
            )
        if self.local_updates:
            model.register_comm_hook(self, _nothing_to_send)
        elif self.scheme is not None:
            self.handle = connect(
                model, self.scheme, None, remedy=_REMEDY, timeout_s=self.timeout_s
            )

    def connect(
        self, model: nn.Module, optimizer: Optimizer | None, scaler: GradScaler | None = None
    ) -> Attachment:
        """Attach to a prepared model, if that is not done. Collective.

        Raises:
            RuntimeError: there is one process only.
            Exception: whatever :func:`commkit.attach` raises.
        """
        if not torch.distributed.is_initialized():
            raise RuntimeError(
                f"scheme={self.scheme!r} was given, and there is no process group: this is a single process; start the "
                "script with torchrun or accelerate launch, or leave the scheme out"
            )
        plain = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        if self.handle is None:
            self.handle = connect(
                model,
                self.scheme,
                plain,
                remedy=_REMEDY,
                grad_scaler=scaler,
                timeout_s=self.timeout_s,
            )
        elif isinstance(self.handle, Handle):  # attached before the optimizer was known
            if plain is not None:
                check_one_scheme(self.scheme, plain)
                refuse_double_momentum(self.handle.reducer, plain)
            self.handle.grad_scaler = scaler
        self._optimizer = plain
        return self.handle

    def attach(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer | None = None
    ) -> Attachment:
        """Call it once, after ``accelerator.prepare`` and before the first step. Collective.

        Args:
            accelerator: the one that this was given to.
            model: as ``prepare`` has returned it.
            optimizer: likewise. Needed by schemes with local updates and optimizers that communicate.

        Returns:
            The attachment: its ``last_step`` says what the last step cost; for local updates call its ``close()`` at
            the end of training.

        Raises:
            RuntimeError: there is one process only, or a DDP spans replicas that are to train alone.
            Exception: whatever :func:`commkit.attach` raises.
        """
        handle = self.connect(model, optimizer, accelerator.scaler)
        state = _InState(self)
        accelerator.register_save_state_pre_hook(state.save)
        accelerator.register_load_state_pre_hook(state.notice)
        accelerator.register_for_checkpointing(state)
        return handle

    def save(self, directory: Path) -> None:
        """Write the scheme's state below ``directory``. Collective."""
        assert self.handle is not None
        checkpoint.save(directory / _DIRECTORY, **contents_of(self.handle, self._optimizer))

    def load(self, directory: Path) -> None:
        """Restore it, after the framework has restored the rest. Collective.

        Raises:
            CheckpointError: ``directory`` was saved without a scheme.
        """
        assert self.handle is not None
        checkpoint.load(
            directory / _DIRECTORY,
            **contents_of(self.handle, self._optimizer),
            on_resize=self.on_resize,  # type: ignore[arg-type]
        )


class _InState:
    """An object of ``accelerator.register_for_checkpointing``, of which Accelerate writes the main process' state: that
    holds nothing. All ranks save together when the directory is known, and load last, when Accelerate has loaded the rest."""

    def __init__(self, kwargs: SchemeKwargs) -> None:
        self._kwargs = kwargs
        self._directory = Path()

    def save(self, models: list[nn.Module], weights: list[Any], directory: str) -> None:
        self._kwargs.save(Path(directory))

    def notice(self, models: list[nn.Module], directory: str) -> None:
        self._directory = Path(directory)

    def state_dict(self) -> dict[str, str]:
        return {"directory": _DIRECTORY}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        self._kwargs.load(self._directory)


def _nothing_to_send(
    state: SchemeKwargs,
    bucket: torch.distributed.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    if state.handle is None:
        raise RuntimeError(
            f"scheme={state.scheme!r} follows the optimizer's steps and has not been told which optimizer; call "
            "attach(accelerator, model, optimizer) after accelerator.prepare"
        )
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done

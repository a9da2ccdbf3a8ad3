"""DistributedDataParallel: ``attach`` and the raw ``(state, hook)`` pair.

No ``from __future__ import annotations`` here: DDP compares the hook's annotations with classes.
"""

import dataclasses
import time
import weakref
from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

from ..aggregators.nodes import INTER
from ..comm import DistComm, new_group_like
from ..metrics import StepStats
from ..reducer import Reducer
from ..schemes import Scheme, make_reducer
from ..types import StateDict
from .agreement import agree
from .alarm import Alarm
from .worker import ReductionWorker

_attached: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_attachments = 0


class Handle:
    """An attachment: the hook's state, what it measured, and how to save and close it.

    Attributes:
        reducer: the scheme at work; its ``state_dict`` holds residuals by parameter name.
        comm: collectives over DDP's own group, for the training thread (loss means and the like). The
            reductions have a group to themselves.
        last_step: :class:`~commkit.StepStats` of the last synchronised backward pass.
    """

    def __init__(
        self,
        reducer: Reducer,
        names: "WeakTensorKeyDictionary",
        group: dist.ProcessGroup,
        device: torch.device,
        may_skip_parameters: bool,
        timeout_s: float,
    ) -> None:
        global _attachments
        _attachments += 1
        self.reducer = reducer
        self.comm = DistComm(group)
        self._names = names
        self._may_skip_parameters = may_skip_parameters
        self._private_comm = DistComm(new_group_like(group, timeout_s), timeout_s)
        like = {name: p for p, name in names.items()}  # type: ignore[no-untyped-call]
        reducer.prepare(like, self._private_comm)
        self._worker = ReductionWorker(Alarm(group, str(_attachments)), timeout_s, device)
        self._last_step = StepStats()
        self._before = self._private_comm.bytes.copy()
        self._reduce_seconds = 0.0

    @property
    def last_step(self) -> StepStats:
        return dataclasses.replace(self._last_step, residual_norm=self.reducer.residual_norm)

    @property
    def failure(self) -> Exception | None:
        """Why the attachment can no longer be used, if so."""
        return self._worker.failure

    def state_dict(self) -> StateDict:
        """This rank's reducer state, see :meth:`commkit.Reducer.state_dict`. Call it between steps."""
        return self.reducer.state_dict()

    def load_state_dict(self, state: StateDict) -> None:
        self.reducer.load_state_dict(state)

    def close(self) -> None:
        """Wait for reductions in flight and stop the threads. DDP cannot forget a hook: a later
        synchronised backward pass raises."""
        # The private group lives until destroy_process_group(): torch gives a new group over the same
        # ranks the name of a destroyed one, and with it the stale addresses under that name in the store.
        self._worker.close()

    def submit(
        self,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        """Queue the reduction of one bucket; called by the hook."""
        buffer, is_last, called = bucket.buffer(), bucket.is_last(), time.perf_counter()
        named = {
            self._names[parameter]: gradient
            for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True)
        }
        return self._worker.submit(lambda: self._reduce(named, buffer, is_last, called), buffer)

    def _reduce(
        self, named: dict[str, Tensor], buffer: Tensor, is_last: bool, called: float
    ) -> Tensor:
        start = time.perf_counter()
        hold = _unused(named) if self._may_skip_parameters else ()
        results = self.reducer.reduce(named, self._private_comm, hold)
        for key, result in results.items():
            if result.data_ptr() != named[key].data_ptr():
                named[key].copy_(result)
        end = time.perf_counter()
        self._reduce_seconds += end - start
        if is_last:
            self._end_step(exposed=end - called)
        return buffer

    def _end_step(self, exposed: float) -> None:
        now, before = self._private_comm.bytes, self._before
        self._last_step = dataclasses.replace(
            self.reducer.end_step(),
            payload_bytes=now.payload_bytes - before.payload_bytes,
            wire_bytes=now.wire_bytes - before.wire_bytes,
            inter_node_bytes=now.labelled(INTER) - before.labelled(INTER),
            rounds=now.rounds - before.rounds,
            comm_seconds=now.seconds - before.seconds,
            reduce_seconds=self._reduce_seconds,
            exposed_comm_seconds=exposed,
        )
        self._before = now.copy()
        self._reduce_seconds = 0.0


def ddp_hook(
    state: Handle,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """The communication hook: ``ddp.register_comm_hook(handle, ddp_hook)``."""
    return state.submit(bucket)


def attach(
    model: DistributedDataParallel, scheme: Scheme, timeout_s: float = 1800.0, **knobs: Any
) -> Handle:
    """Reduce a DDP model's gradients with ``scheme`` from now on.

    Collective over the model's process group. Call it once, before the first backward pass (or between
    two), with the same arguments on every rank.

    Args:
        model: a DistributedDataParallel module.
        scheme: a scheme's name, a mapping ``{name: ..., ...}``, a path to a YAML file, or a Reducer.
        timeout_s: seconds after which a stuck reduction raises on all ranks.
        knobs: fields of the scheme, e.g. ``rank=4``.

    Raises:
        ConfigError: unknown scheme or field, or a value out of range.
        TypeError: not a DDP module, or parts that cannot go together.
        RuntimeError: attached before, or ranks disagree (the differing field is named).
        ValueError: sparse gradients, or DDP options that use the hook themselves.

    If any rank is refused, every rank raises.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"attach needs a DistributedDataParallel module, got {type(model).__name__}; wrap the model "
            "in torch.nn.parallel.DistributedDataParallel first"
        )
    handle, hook = ddp_comm_hook(
        model,
        scheme,
        process_group=model.process_group,
        timeout_s=timeout_s,
        may_skip_parameters=model.find_unused_parameters or model.static_graph,
        **knobs,
    )
    model.register_comm_hook(handle, hook)
    _attached.add(model)
    return handle


def ddp_comm_hook(
    module: nn.Module,
    scheme: Scheme,
    process_group: dist.ProcessGroup | None = None,
    timeout_s: float = 1800.0,
    may_skip_parameters: bool = True,
    **knobs: Any,
) -> tuple[Handle, Any]:
    """The pair ``(state, hook)`` for code that registers hooks itself, e.g. Lightning's ``DDPStrategy``.

    Args:
        module: the model, wrapped in DDP or not; its parameter names key the state.
        scheme: as for :func:`attach`.
        process_group: DDP's group; None is the default group.
        timeout_s: as for :func:`attach`.
        may_skip_parameters: whether a step may leave parameters unused (``find_unused_parameters`` or
            ``static_graph``); costs one pass over the gradients.
        knobs: fields of the scheme.

    Raises:
        The same as :func:`attach`.
    """
    group = process_group if process_group is not None else dist.group.WORLD
    if group is None:
        raise RuntimeError("torch.distributed is not initialised; call init_process_group() first")
    error: Exception | None = None
    fingerprint: dict[str, Any] = {}
    try:
        if module in _attached:
            raise RuntimeError(
                "the model is attached already; attach once, or wrap it in a new DDP"
            )
        inner = module.module if isinstance(module, DistributedDataParallel) else module
        reducer = make_reducer(scheme, knobs)
        parameters = _reduced_parameters(module, inner)
        fingerprint = {
            "scheme": reducer.spec(),
            "parameters": {name: f"{tuple(p.shape)} {p.dtype}" for name, p in parameters},
            "step": reducer.step,
        }
    except Exception as caught:
        error = caught
    agree(DistComm(group), fingerprint, error)

    names = WeakTensorKeyDictionary()
    for name, parameter in parameters:
        names[parameter] = name
    device = parameters[0][1].device
    return Handle(reducer, names, group, device, may_skip_parameters, timeout_s), ddp_hook


def _reduced_parameters(module: nn.Module, inner: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that DDP reduces."""
    if getattr(module, "mixed_precision", None) is not None:
        raise ValueError(
            "DDP(mixed_precision=...) registers a hook of its own; use torch.autocast instead"
        )
    for name, child in inner.named_modules():
        if getattr(child, "sparse", False) and isinstance(child, nn.Embedding | nn.EmbeddingBag):
            raise ValueError(
                f"module {name!r} has sparse=True; sparse gradients cannot be compressed, "
                "use sparse=False"
            )
    parameters = [(n, p) for n, p in inner.named_parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            "the model has no parameter with requires_grad=True, so there is nothing to reduce; "
            "unfreeze one"
        )
    devices = {p.device for _, p in parameters}
    if len(devices) > 1:
        raise ValueError(
            f"parameters are on several devices ({sorted(map(str, devices))}); use one"
        )
    return parameters


def _unused(named: dict[str, Tensor]) -> Collection[str]:
    """Parameters whose gradient is exactly zero here."""

    def zero(x: Tensor) -> bool:
        return x.numel() > 0 and not bool(torch.stack(torch.aminmax(x)).any())

    return {key for key, gradient in named.items() if zero(gradient)}

"""DistributedDataParallel: the communication hook, and the raw ``(state, hook)`` pair.

No ``from __future__ import annotations`` here: DDP compares the hook's annotations with classes.
"""

import dataclasses
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

from ..comm import DistComm, private_comm, require_group
from ..metrics import StepStats
from ..reducer import Reducer
from ..runtime.agreement import mark_attached, trainable_parameters, wrapped_in_ddp
from ..runtime.alarm import Alarm
from ..runtime.meter import StepMeter
from ..runtime.wire_checksums import CheckedComm
from ..runtime.worker import ReductionWorker
from ..schemes import Scheme, make_reducer
from ..types import Comm, StateDict
from .agreement import agree_to_attach
from .loss_scale import GradScaler, scale_of, unscaled, write_back

_attachments = 0


class Handle:
    """An attachment: the hook's state, what it measured, and how to save and close it.

    Attributes:
        reducer: the scheme at work; its ``state_dict`` holds residuals by parameter name.
        comm: collectives over DDP's own group, for the training thread (loss means and the like). The
            reductions have a group to themselves.
        last_step: :class:`~commkit.StepStats` of the last synchronised backward pass.
        grad_scaler: as given to :func:`commkit.attach`; may still be set before the first backward pass.
    """

    def __init__(
        self,
        reducer: Reducer,
        names: "WeakTensorKeyDictionary",
        group: dist.ProcessGroup,
        device: torch.device,
        may_skip_parameters: bool,
        timeout_s: float,
        grad_scaler: GradScaler | None = None,
        wire_checksums: bool = False,
    ) -> None:
        global _attachments
        _attachments += 1
        self.reducer = reducer
        self.comm = DistComm(group)
        self._names = names
        self._may_skip_parameters = may_skip_parameters
        private = private_comm(group, timeout_s)
        self._private_comm: Comm = CheckedComm(private) if wire_checksums else private
        like = {name: p for p, name in names.items()}  # type: ignore[no-untyped-call]
        reducer.prepare(like, self._private_comm)
        self._worker = ReductionWorker(Alarm(group, str(_attachments)), timeout_s, device)
        self.grad_scaler = grad_scaler
        self._waiting: dict[str, Tensor] = {}
        self._last_step = StepStats()
        self._meter = StepMeter(self._private_comm)

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
        if self.reducer.whole_step:
            self._waiting.update(named)
            if not is_last:
                return self._worker.hold(buffer)
            named, self._waiting = self._waiting, {}
        return self._worker.submit(lambda: self._reduce(named, buffer, is_last, called), buffer)

    def _reduce(
        self, named: dict[str, Tensor], buffer: Tensor, is_last: bool, called: float
    ) -> Tensor:
        start = time.perf_counter()
        hold = _unused(named) if self._may_skip_parameters else ()
        scale = scale_of(self.grad_scaler)
        results = self.reducer.reduce(unscaled(named, scale), self._private_comm, hold)
        write_back(results, named, scale)
        end = time.perf_counter()
        self._meter.add(end - start)
        if is_last:
            self._last_step = self._meter.close(self.reducer.end_step(), exposed=end - called)
        return buffer


class DeferredHandle:
    """State of a hook that is registered before there is a model or a process group; it attaches to the
    DistributedDataParallel of the first bucket that it is given.

    Args:
        scheme: as for :func:`commkit.attach`.
        knobs: fields of the scheme.
        timeout_s: as for :func:`commkit.attach`.

    Attributes:
        handle: of the attachment; None before the first bucket.

    Raises:
        ConfigError: unknown scheme or field, or a value out of range.
        TypeError: a scheme that does not reduce gradients.
    """

    def __init__(self, scheme: Scheme, knobs: dict[str, Any], timeout_s: float) -> None:
        make_reducer(scheme, knobs)
        self.scheme, self.knobs, self.timeout_s = scheme, knobs, timeout_s
        self.handle: Handle | None = None

    def attach(
        self, model: DistributedDataParallel, grad_scaler: GradScaler | None = None
    ) -> Handle:
        """What the first bucket does, now. Collective."""
        self.handle = _handle(
            model,
            lambda: make_reducer(self.scheme, self.knobs),
            model.process_group,
            grad_scaler,
            self.timeout_s,
            _may_skip_parameters(model),
            sole_hook=False,  # it is registered, and this one
        )
        mark_attached(model)
        return self.handle

    def submit(
        self,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        """Attach, the first time; then queue the reduction. Called by the hook, in the order of all ranks."""
        if self.handle is None:
            model = wrapped_in_ddp(bucket.parameters())
            if model is None:
                raise RuntimeError(
                    "no DistributedDataParallel holds the parameters of this bucket; use commkit.attach"
                )
            return self.attach(model).submit(bucket)
        return self.handle.submit(bucket)


def ddp_hook(
    state: Handle | DeferredHandle,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """The communication hook: ``ddp.register_comm_hook(handle, ddp_hook)``."""
    return state.submit(bucket)


def attach_ddp(
    model: DistributedDataParallel,
    make: Callable[[], Reducer],
    grad_scaler: GradScaler | None,
    timeout_s: float,
    wire_checksums: bool = False,
) -> Handle:
    """See :func:`commkit.attach` and :class:`commkit.Debug`."""
    handle = _handle(
        model,
        make,
        model.process_group,
        grad_scaler,
        timeout_s,
        _may_skip_parameters(model),
        wire_checksums=wire_checksums,
    )
    model.register_comm_hook(handle, ddp_hook)
    mark_attached(model)
    return handle


def _may_skip_parameters(model: DistributedDataParallel) -> bool:
    return bool(model.find_unused_parameters or model.static_graph)


def ddp_comm_hook(
    module: nn.Module,
    scheme: Scheme,
    process_group: dist.ProcessGroup | None = None,
    grad_scaler: GradScaler | None = None,
    timeout_s: float = 1800.0,
    may_skip_parameters: bool = True,
    **knobs: Any,
) -> tuple[Handle, Any]:
    """The pair ``(state, hook)`` for code that registers hooks itself, e.g. Lightning's ``DDPStrategy``.

    Args:
        module: the model, wrapped in DDP or not; its parameter names key the state.
        scheme: as for :func:`commkit.attach`.
        process_group: DDP's group; None is the default group.
        grad_scaler: as for :func:`commkit.attach`.
        timeout_s: as for :func:`commkit.attach`.
        may_skip_parameters: whether a step may leave parameters unused (``find_unused_parameters`` or
            ``static_graph``); costs one pass over the gradients.
        knobs: fields of the scheme.

    Raises:
        The same as :func:`commkit.attach`.
    """
    handle = _handle(
        module,
        lambda: make_reducer(scheme, knobs),
        process_group,
        grad_scaler,
        timeout_s,
        may_skip_parameters,
    )
    return handle, ddp_hook


def _handle(
    module: nn.Module,
    make: Callable[[], Reducer],
    process_group: dist.ProcessGroup | None,
    grad_scaler: GradScaler | None,
    timeout_s: float,
    may_skip_parameters: bool,
    sole_hook: bool = True,
    wire_checksums: bool = False,
) -> Handle:
    group = require_group(process_group)
    inner = module.module if isinstance(module, DistributedDataParallel) else module
    reducer, parameters = agree_to_attach(
        module, DistComm(group), make, lambda: _reduced_parameters(module, inner, sole_hook)
    )
    names = WeakTensorKeyDictionary()
    for name, parameter in parameters.items():
        names[parameter] = name
    device = next(iter(parameters.values())).device
    return Handle(
        reducer, names, group, device, may_skip_parameters, timeout_s, grad_scaler, wire_checksums
    )


def _reduced_parameters(
    module: nn.Module, inner: nn.Module, sole_hook: bool
) -> dict[str, nn.Parameter]:
    """Parameters that DDP reduces, by name."""
    if getattr(module, "mixed_precision", None) is not None:
        raise ValueError(
            "DDP(mixed_precision=...) registers a hook of its own; use torch.autocast instead"
        )
    hooks = getattr(
        module, "_comm_hooks", None
    )  # DDP has no public word for it, and takes one hook only
    if hooks and sole_hook:
        name = getattr(hooks[0][0], "__qualname__", type(hooks[0][0]).__name__)
        raise RuntimeError(
            f"the model has a communication hook already, {name}; register one only: leave it out, or commkit's"
        )
    return trainable_parameters(inner)


def _unused(named: dict[str, Tensor]) -> Collection[str]:
    """Parameters whose gradient is exactly zero here."""

    def zero(x: Tensor) -> bool:
        return x.numel() > 0 and not bool(torch.stack(torch.aminmax(x)).any())

    return {key for key, gradient in named.items() if zero(gradient)}

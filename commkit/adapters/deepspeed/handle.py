"""Reductions of an engine's gradients: what all ZeRO stages have in common."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...aggregators.health import are_finite
from ...comm import DistComm, private_comm, require_group
from ...metrics import StepStats
from ...reducer import Reducer
from ...runtime.agreement import unmark_attached
from ...runtime.meter import StepMeter
from ..kept import KeepsState
from ..loss_scale import unscaled, write_back


class EngineHandle(KeepsState[Reducer]):
    """An attachment to a DeepSpeed engine.

    A *pass* is one reduction of all gradients: one per optimizer step at stages 0 and 1, and one per backward at
    stages 2 and 3, as in DeepSpeed itself. Each is a step of the reducer.

    If any rank's gradients are not finite, or the mean does not fit into fp16, DeepSpeed skips the optimizer step on
    all ranks; then nothing of it is left in residuals, whatever number of passes it had: for several, in fp16, a copy of
    the scheme's state is kept while they last.

    Args:
        engine: the engine; gradients carry its loss scale.
        reducer: the scheme.
        like: tensors like the gradients to come, by parameter name.
        group: the engine's data-parallel ranks.
        timeout_s: of the collectives.

    Attributes:
        comm: collectives over the data-parallel ranks, for the training thread.
    """

    def __init__(
        self,
        engine: Any,
        reducer: Reducer,
        like: Mapping[str, Tensor],
        group: dist.ProcessGroup,
        timeout_s: float,
    ) -> None:
        self.reducer = reducer
        self.comm = DistComm(group)
        self._engine = engine
        self._private = private_comm(group, timeout_s)
        self._everybody: DistComm | None = None
        if self._private.world_size < dist.get_world_size():
            # Other ranks hold other parts of the model, and a step is skipped on all.
            self._everybody = private_comm(require_group(None), timeout_s)
        reducer.prepare(like, self._private)
        self._meter = StepMeter(self._private)
        self._undo: list[Callable[[], None]] = []
        self._seconds = 0.0
        self._reductions = 0
        self._fits = True
        self._optimizer_step = -1
        self._finite = True  # all passes of this optimizer step so far
        self._passes: list[StepStats] = []
        self._before: dict[str, Tensor] | None = None

    @property
    def last_step(self) -> StepStats:
        """Of the last optimizer step, all its passes together."""
        passes = self._passes or [StepStats()]
        total = dataclasses.replace(passes[-1], residual_norm=self.reducer.residual_norm)
        for name in _ADDED:
            total = dataclasses.replace(total, **{name: sum(getattr(p, name) for p in passes)})
        return dataclasses.replace(total, nonfinite=any(p.nonfinite for p in passes))

    def close(self) -> None:
        """Give DeepSpeed its own reductions back."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        module: nn.Module = self._engine.module
        unmark_attached(module)

    def replace(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        """From now until :meth:`close`, ``owner.name`` is ``method``."""
        own = vars(owner).get(name)
        setattr(owner, name, method)
        self._undo.append(
            lambda: delattr(owner, name) if own is None else setattr(owner, name, own)
        )

    def undo_too(self, undo: list[Callable[[], None]]) -> None:
        """What else :meth:`close` takes back."""
        self._undo += undo

    @torch.no_grad()
    def reduce(self, named: dict[str, Tensor]) -> None:
        """Put means in the place of gradients ``named``, which have the loss scale on them."""
        start = time.perf_counter()
        self._begin()
        if self.reducer.whole_step and self._reductions:
            raise RuntimeError(
                "this scheme needs all gradients of a step at once, and DeepSpeed brought them in several buckets; "
                "raise zero_optimization.reduce_bucket_size above the number of parameters"
            )
        self._reductions += 1
        scale = loss_scale(self._engine)
        results = self.reducer.reduce(unscaled(named, scale), self._private)
        write_back(results, named, scale)
        if scale != 1.0 and not are_finite(named.values()):
            self._fits = False  # a mean that fits float32 may not fit fp16 once it is scaled
        self._add(time.perf_counter() - start)

    @torch.no_grad()
    def end_pass(self) -> None:
        """All gradients of a backward pass, or of an optimizer step, are reduced."""
        if not self._reductions:
            return
        start = time.perf_counter()
        self._finite = self._finite and self._finite_everywhere()
        stats = self.reducer.end_step(keep=self._finite)
        if not self._finite and self._before is not None:
            self.reducer.load_state_dict(self._before)
        self._add(time.perf_counter() - start)
        self._passes.append(self._meter.close(stats, exposed=self._seconds))
        self._seconds, self._reductions, self._fits = 0.0, 0, True

    def _add(self, seconds: float) -> None:
        self._meter.add(seconds)
        self._seconds += seconds

    def _begin(self) -> None:
        """Before the first reduction of an optimizer step."""
        if self._engine.global_steps == self._optimizer_step:
            return
        self._optimizer_step = self._engine.global_steps
        self._finite, self._passes = True, []
        self._before = None
        if _skips_several_passes(self._engine):
            self._before = {key: x.clone() for key, x in self.reducer.state_dict().items()}

    def _finite_everywhere(self) -> bool:
        """The same on all ranks: reductions give the same bits to all that take part in them."""
        mine = self.reducer.finite and self._fits
        if self._everybody is None:
            return mine
        device = next(self._engine.module.parameters()).device
        flag = torch.tensor([0.0 if mine else 1.0], device=device)
        return float(self._everybody.all_reduce(flag, "max")) == 0.0


_ADDED = (
    "dense_bytes",
    "payload_bytes",
    "wire_bytes",
    "inter_node_bytes",
    "rounds",
    "comm_seconds",
    "reduce_seconds",
    "exposed_comm_seconds",
)


def loss_scale(engine: Any) -> float:
    """By how much the engine's gradients are too large now."""
    scaler = engine.torch_autocast_z0_gradscaler
    if scaler is not None:
        return float(scaler.get_scale())
    if not engine.fp16_enabled():
        return 1.0
    return float(engine.optimizer.loss_scale)


def _skips_several_passes(engine: Any) -> bool:
    """Whether a pass may be given up after another one of the same optimizer step was finished."""
    several = engine.gradient_accumulation_steps() > 1 or not engine.managed_gradient_accumulation()
    return bool(
        engine.fp16_enabled() and engine.zero_optimization_partition_gradients() and several
    )

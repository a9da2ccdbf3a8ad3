"""FSDP1 (``FullyShardedDataParallel``): its communication hook, which sees flat gradients.

No ``from __future__ import annotations`` here, as in :mod:`.ddp`.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from ..comm import DistComm
from ..feedback import NoFeedback
from ..metrics import StepStats
from ..reducer import Reducer
from ..registry import spec
from ..runtime.agreement import agree, mark_attached, refuse_attached
from ..runtime.backward import EndOfBackward
from ..runtime.meter import StepMeter
from ..schemes import ddp
from ..sharded import Exchange, Segment, ShardedScheme
from .kept import KeepsState
from .loss_scale import GradScaler, write_back

_SHARDED = (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP)
_FLAT = "flat_param"
_ANY_MATRIX = torch.Size((2**30, 2**30))  # so that no policy leaves it out
_CALLS = 100_003  # more than there are reductions in a step, so that each has a number of its own


class FSDP1Handle(KeepsState[Reducer]):
    """An attachment to a FullyShardedDataParallel model.

    FSDP1 hands over one flat gradient for each of its units and does not say which unit it is, so there is no state, and no
    parameter is left out: norms and biases are compressed with the rest.

    Attributes:
        comm: collectives over the model's ranks.
        last_step: of the last backward pass.
    """

    def __init__(self, comm: DistComm, reducer: Reducer, exchange: Exchange | None) -> None:
        self.comm = comm
        self.reducer = reducer
        self.last_step = StepStats()
        self._exchange = exchange
        self._meter = StepMeter(comm)
        self._calls = self._dense_bytes = 0
        self._end = EndOfBackward(self._finish)

    def close(self) -> None:
        """Nothing to stop; FSDP cannot forget a hook."""

    def reduce(self, flat: Tensor, output: Tensor | None) -> None:
        """What the hook does: ``flat`` is the whole flat gradient of a unit, ``output`` this rank's shard of the mean;
        None: all ranks get all of the mean, in place."""
        start = time.perf_counter()
        self._dense_bytes += flat.numel() * flat.element_size()
        # Tells this backward pass's reductions apart, for rounding alone.
        key = f"{_FLAT}.{self._calls}"
        if output is None:
            named = {key: flat}
            write_back(self.reducer.reduce(named, self.comm), named, 1.0)
        else:
            assert self._exchange is not None
            rows = flat.view(self.comm.world_size, -1)
            segment = Segment(_FLAT, flat.numel(), 1, self.comm.world_size)
            self._exchange.mean_into(
                output, rows, (segment,), self.reducer.step * _CALLS + self._calls
            )
        self._calls += 1
        self._meter.add(time.perf_counter() - start)
        self._end.arm()

    def _finish(self) -> None:
        stats = dataclasses.replace(
            self.reducer.end_step(),
            dense_bytes=self._dense_bytes,
            num_contributors=self.comm.world_size,
        )
        measured = self._meter.close(stats, exposed=0.0)
        # FSDP waits for its hook, so nothing is hidden.
        self.last_step = dataclasses.replace(measured, exposed_comm_seconds=measured.reduce_seconds)
        self._calls = self._dense_bytes = 0


def attach_fsdp1(
    model: FullyShardedDataParallel,
    make: "Callable[[], ShardedScheme] | Callable[[], Reducer]",
    grad_scaler: GradScaler | None,
) -> FSDP1Handle:
    """See :func:`commkit.attach`. Nothing is kept from step to step, so a ``grad_scaler`` may scale as it likes."""
    comm = DistComm(model.process_group)  # type: ignore[arg-type]
    error: Exception | None = None
    fingerprint: dict[str, Any] = {}
    try:
        refuse_attached(model)
        scheme = make()
        _check(model, scheme)
        fingerprint = {
            "scheme": scheme.spec() if isinstance(scheme, Reducer) else spec(scheme),
            "strategy": str(model.sharding_strategy),
        }
    except Exception as caught:
        error = caught
    agree(comm, fingerprint, error)
    if isinstance(scheme, ShardedScheme):
        exchange = scheme.scattering({_FLAT: _ANY_MATRIX}, comm)
        handle = FSDP1Handle(comm, ddp(), exchange)
    else:
        handle = FSDP1Handle(comm, scheme, None)
    hook = _no_shard_hook if model.sharding_strategy == ShardingStrategy.NO_SHARD else _shard_hook
    model.register_comm_hook(handle, hook)
    mark_attached(model)
    return handle


def _shard_hook(state: FSDP1Handle, flat: Tensor, output: Tensor) -> None:
    state.reduce(flat, output)


def _no_shard_hook(state: FSDP1Handle, flat: Tensor) -> None:
    state.reduce(flat, None)


def _check(model: FullyShardedDataParallel, scheme: "ShardedScheme | Reducer") -> None:
    strategy = model.sharding_strategy
    for module in FullyShardedDataParallel.fsdp_modules(model):
        if module.sharding_strategy != strategy:
            raise ValueError(
                f"units of {strategy} and {module.sharding_strategy} in one model; give all the same sharding strategy, "
                "or use fully_shard"
            )
    if strategy != ShardingStrategy.NO_SHARD and strategy not in _SHARDED:
        raise ValueError(
            f"FSDP1 allows no communication hook with {strategy}; use FSDP2: fully_shard(module, "
            'mesh=mesh["shard"]) on the layers and the model, and commkit.attach(model, scheme, mesh=mesh)'
        )
    if strategy == ShardingStrategy.NO_SHARD:
        if isinstance(scheme, ShardedScheme):
            raise TypeError("NO_SHARD scatters nothing; use a scheme such as int8, or FULL_SHARD")
        if not isinstance(scheme.feedback, NoFeedback) or scheme.whole_step:
            raise TypeError(
                "FSDP1 does not say whose gradient it hands over, so nothing can be kept of it; NO_SHARD is what "
                "DistributedDataParallel does: use that, or a scheme without feedback"
            )
        return
    if isinstance(scheme, Reducer):
        raise TypeError(
            "FSDP1 scatters gradients, which a Reducer does not; use the scheme qsdp with weight_bits=32, or "
            "fully_shard and a mesh with a replicate axis"
        )
    if scheme.weights is not None or scheme.reducer is not None or scheme.feedback != "none":
        raise TypeError(
            "FSDP1 lets gradients alone be compressed, without feedback; use weight_bits=32, or fully_shard (FSDP2)"
        )
    if scheme.gradients is None:
        raise ValueError("with gradient_bits=32 there is nothing to do; leave attach out")

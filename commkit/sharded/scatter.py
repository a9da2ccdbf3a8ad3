"""Quantised gradients on their way to their owners: FSDP2's reduce-scatter."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from ..comm import DistComm, nbytes
from ..metrics import profiler_range
from .collective import Collective
from .exchange import Exchange
from .layout import Unit
from .steps import PassCounter
from .usage import Usage

_OPS = {"AVG": True, "SUM": False}


class CountedReduceScatter(Collective):
    """FSDP2's own reduce-scatter of one unit, for ``FSDPModule.set_custom_reduce_scatter``, with its bytes counted.

    Args:
        comm: over the group of the unit's shards.
        passes: the backward passes so far, of which each that scatters is one.

    Attributes:
        dense_bytes: of all that was scattered so far, uncompressed.
    """

    def __init__(self, comm: DistComm, passes: PassCounter) -> None:
        super().__init__(comm)
        self._passes = passes

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> dist.Work | None:
        self.dense_bytes += nbytes(input_tensor)
        self._passes.mark()
        return self.scatter(output_tensor, input_tensor, op, async_op)

    def scatter(
        self, out: Tensor, gradients: Tensor, op: object, async_op: bool
    ) -> dist.Work | None:
        """Reduce-scatter over the shards' group."""
        return self._comm.reduce_scatter_into(out, gradients, op, async_op)

    def close(self) -> None:
        """Nothing to stop."""


class CompressedReduceScatter(CountedReduceScatter):
    """The reduce-scatter of one unit, compressed.

    Args:
        unit: whose gradients are scattered.
        exchange: how.
        comm: over the group of the unit's shards.
        passes: as above; rounding draws anew in each.
    """

    def __init__(self, unit: Unit, exchange: Exchange, comm: DistComm, passes: PassCounter) -> None:
        super().__init__(comm, passes)
        self._exchange = exchange
        self._usage = Usage(unit)

    def scatter(self, out: Tensor, gradients: Tensor, op: object, async_op: bool) -> None:
        """Done, in stream order, when it returns. ``op`` is AVG, or SUM where FSDP divides itself.

        Raises:
            RuntimeError: another ``op``, or gradients that are not the unit's parameters'.
        """
        average = _OPS.get(str(op).rpartition(".")[2])
        if average is None:
            raise RuntimeError(
                f"FSDP asks for the reduction {op}, as after set_gradient_divide_factor; call "
                "set_force_sum_reduction_for_comms(True) on every module, so that it divides by itself"
            )
        rows = gradients.view(self._comm.world_size, -1)
        segments = self._usage.segments(rows.shape[1])
        with profiler_range("scatter_gradients"):
            self._exchange.mean_into(out, rows, segments, self._passes.count)
        if not average:
            out.mul_(self._comm.world_size)

    def close(self) -> None:
        """Watch the unit no more."""
        self._usage.close()

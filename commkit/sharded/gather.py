"""Quantised weights on their way to where they are used: FSDP2's all-gather."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ..comm import DistComm, nbytes
from ..metrics import profiler_range
from ..types import Comm
from .collective import Collective
from .layout import Segment, Unit
from .message import RowCodec
from .steps import StepCounter


def gather_into(
    out: Tensor,
    chunks: Tensor,
    segments: Sequence[Segment],
    codec: RowCodec,
    comm: Comm,
    step: int,
) -> None:
    """All-gather this rank's ``chunks``, (n,), of all segments: ``out``, (W, n), becomes what every rank's message says,
    this one's too. The same bits on every rank, and again whenever the same is gathered in the same ``step``."""
    own = codec.encode(chunks, segments, comm.rank, step, salt=comm.rank)
    longest = codec.size(chunks, segments, 0, step)  # no chunk is larger than the first
    rows = comm.all_gather(pad(own, (0, longest - own.numel())))
    for rank, message in enumerate(rows):
        codec.decode_into(out[rank], [message], segments, rank, step)


class CountedAllGather(Collective):
    """FSDP2's own all-gather of one unit, for ``FSDPModule.set_custom_all_gather``, with its bytes counted.

    Args:
        comm: over the group of the unit's shards.

    Attributes:
        dense_bytes: of all that was gathered so far, uncompressed.
    """

    def __init__(self, comm: DistComm) -> None:
        super().__init__(comm)
        self._others: dict[dist.ProcessGroup, DistComm] = {}

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        self.dense_bytes += nbytes(output_tensor)
        if dist.get_process_group_ranks(group) == dist.get_process_group_ranks(self._comm.group):
            return self.gather(output_tensor, input_tensor, async_op)
        # FSDP's secondary partition, ``reshard_after_forward`` with a number of ranks: weights that were decoded before
        # move inside a node, as they are.
        if group not in self._others:
            self._others[group] = self._comm.joined(group, "secondary")
        return self._others[group].all_gather_into(output_tensor, input_tensor, async_op)

    def gather(self, out: Tensor, chunks: Tensor, async_op: bool) -> dist.Work | None:
        """All-gather over the shards' group."""
        return self._comm.all_gather_into(out, chunks, async_op)


class CompressedAllGather(CountedAllGather):
    """The all-gather of one unit, compressed.

    Every rank encodes its chunks once and decodes everybody's, its own too, so that all work with the same weights.
    Until the optimizer steps the same chunks are encoded in the same way: forward, backward and recomputation see the
    same bits.

    Args:
        unit: whose parameters are gathered.
        codec: how their chunks are encoded.
        comm: over the group of the unit's shards.
        steps: how often the optimizer has stepped.
    """

    def __init__(self, unit: Unit, codec: RowCodec, comm: DistComm, steps: StepCounter) -> None:
        super().__init__(comm)
        self._unit = unit
        self._codec = codec
        self._steps = steps

    def gather(self, out: Tensor, chunks: Tensor, async_op: bool) -> None:
        """Done, in stream order, when it returns.

        Raises:
            RuntimeError: other parameters than the unit's at attach.
        """
        if chunks.numel() != self._unit.padded or not chunks.is_floating_point():
            raise RuntimeError(
                f"FSDP gathers {chunks.numel()} elements of {chunks.dtype} for {self._unit.name!r}, "
                f"whose parameters are {self._unit.padded} in floating point; call attach after fully_shard, and "
                "keep parameters of one dtype in a unit"
            )
        rows, segments = out.view(self._comm.world_size, -1), self._unit.segments
        with profiler_range("gather_weights"):
            gather_into(rows, chunks, segments, self._codec, self._comm, self._steps.count)

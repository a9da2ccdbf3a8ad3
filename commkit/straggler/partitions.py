"""Which samples a partition, or a chunk of a schedule, is made of: the same on every worker that computes it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch.utils.data import Sampler

from .codes import GradientCode
from .schedule import Chunk


@dataclass(frozen=True)
class BatchLayout:
    """A run's samples, numbered 0, 1, ... in the order in which synchronous training reads them: job t's batch
    is ``batch`` consecutive ones, cut into ``units`` equal units.

    So a job is the very batch that plain training has in that step, and schemes differ in time, not in data.

    Args:
        batch: samples of a job, over all workers.
        units: :attr:`~commkit.straggler.Schedule.num_units`, or a code's ``num_partitions``.

    Raises:
        ValueError: the batch is not a multiple of the units.
    """

    batch: int
    units: int

    def __post_init__(self) -> None:
        if self.units < 1:
            raise ValueError(f"units={self.units} must be >= 1")
        if self.batch < 1 or self.batch % self.units:
            below = self.batch // self.units * self.units
            near = f"{below} or {below + self.units}" if below > 0 else str(self.units)
            raise ValueError(
                f"batch={self.batch} must be a multiple of units={self.units}, into which the scheme cuts "
                f"it; use {near}"
            )

    @property
    def samples_per_unit(self) -> int:
        return self.batch // self.units

    def samples(self, job: int, chunk: Chunk) -> range:
        """Numbers of the run's samples in ``chunk`` of ``job``.

        Raises:
            ValueError: the chunk is outside the job's data.
        """
        if not 0 <= chunk.start < chunk.stop <= self.units:
            raise ValueError(
                f"chunk {chunk.start}..{chunk.stop} must lie within 0..{self.units} units"
            )
        first, size = job * self.batch, self.samples_per_unit
        return range(first + chunk.start * size, first + chunk.stop * size)

    def of_partition(self, job: int, partition: int) -> range:
        """Those of one partition of a code."""
        return self.samples(job, Chunk(partition, partition + 1))


def partition_seed(seed: int, step: int, partition: int) -> int:
    """31-bit seed for augmentation and dropout of a partition: a gradient must be the same wherever it is
    computed. For a chunk, give its ``start``."""
    return zlib.crc32(f"{seed}/{step}/{partition}".encode()) & 0x7FFFFFFF


class PartitionSampler(Sampler[list[int]]):
    """One worker's partitions, step by step: a ``batch_sampler`` whose batches are one partition each.

    Each step gives ``len(code.partitions_of(worker))`` batches in ascending order of the partitions, of which
    each is on ``code.replication`` workers. What a partition holds is a pure function of (order, step, partition).
    State is the number of batches given.

    Args:
        code: who computes what.
        worker: whose partitions.
        batch: samples of a step over all workers, without replicas.
        order: number of a sample in the run -> its index in the data set; a pure function of the seed, such as
            a hash, equal on all workers.

    Raises:
        ValueError: the batch is not a multiple of the code's partitions, or there is no such worker.
    """

    def __init__(
        self, code: GradientCode, worker: int, batch: int, order: Callable[[int], int]
    ) -> None:
        self.partitions = code.partitions_of(worker)
        self.layout = BatchLayout(batch, code.num_partitions)
        self.order = order
        self._given = 0

    @property
    def step(self) -> int:
        """The step of the batch that comes next."""
        return self._given // len(self.partitions)

    def indices(self, step: int, partition: int) -> list[int]:
        """Indices of the data set in ``partition`` of ``step``."""
        return [self.order(sample) for sample in self.layout.of_partition(step, partition)]

    def skip_to(self, step: int) -> None:
        """Go on with the first partition of ``step``: what a worker does that comes back late."""
        self._given = step * len(self.partitions)

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            step, place = divmod(self._given, len(self.partitions))
            self._given += 1
            yield self.indices(step, self.partitions[place])

    def state_dict(self) -> dict[str, int]:
        return {"given": self._given}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._given = state["given"]

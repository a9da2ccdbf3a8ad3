"""Data: a job is the batch of plain training, cut into equal parts, the same on every worker."""

import itertools

import pytest

from commkit.straggler import (
    BatchLayout,
    Chunk,
    CyclicMDS,
    FractionalRepetition,
    PartitionSampler,
    partition_seed,
)


def order(sample: int) -> int:
    return (sample * 7919 + 13) % 1000


@pytest.mark.parametrize(
    "code", [FractionalRepetition(8, 1), CyclicMDS(8, 3)], ids=lambda c: c.name
)
def test_partitions_are_the_batch_of_plain_training(code: object) -> None:
    samplers = [PartitionSampler(code, i, 32, order) for i in range(8)]  # type: ignore[arg-type]
    for step in range(3):
        given: dict[int, list[int]] = {}
        for sampler in samplers:
            assert sampler.step == step
            batches = list(itertools.islice(sampler, len(sampler.partitions)))
            for partition, batch in zip(sampler.partitions, batches, strict=True):
                assert given.setdefault(partition, batch) == batch  # equal on all its workers
        together = [index for p in range(8) for index in given[p]]
        assert together == [order(sample) for sample in range(step * 32, (step + 1) * 32)]


def test_a_sampler_resumes_in_the_middle_of_a_step() -> None:
    whole = list(itertools.islice(PartitionSampler(CyclicMDS(5, 2), 1, 20, order), 12))
    first = PartitionSampler(CyclicMDS(5, 2), 1, 20, order)
    assert list(itertools.islice(first, 4)) == whole[:4]
    resumed = PartitionSampler(CyclicMDS(5, 2), 1, 20, order)
    resumed.load_state_dict(first.state_dict())
    assert list(itertools.islice(resumed, 8)) == whole[4:]
    resumed.skip_to(2)
    assert next(iter(resumed)) == whole[6]


def test_chunks_of_a_schedule_are_ranges_of_the_runs_samples() -> None:
    layout = BatchLayout(batch=48, units=16)
    assert layout.samples(2, Chunk(3, 6)) == range(96 + 9, 96 + 18)
    assert layout.of_partition(0, 15) == range(45, 48)
    with pytest.raises(ValueError, match=r"must lie within 0\.\.16 units"):
        layout.samples(0, Chunk(15, 17))


def test_seeds_follow_step_and_partition_only() -> None:
    seeds = {partition_seed(s, t, p) for s in range(3) for t in range(5) for p in range(7)}
    assert len(seeds) == 3 * 5 * 7
    assert partition_seed(1, 2, 3) == partition_seed(1, 2, 3)


@pytest.mark.parametrize(
    ("batch", "units", "message"),
    [
        (30, 8, "batch=30 must be a multiple of units=8, .*use 24 or 32"),
        (5, 8, "batch=5 must be a multiple of units=8, .*use 8"),
        (0, 8, "batch=0 must be a multiple"),
        (8, 0, "units=0 must be >= 1"),
    ],
)
def test_a_batch_that_cannot_be_cut_is_refused(batch: int, units: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchLayout(batch, units)

"""The hash behind every stochastic rounding: known values, distribution, independence of seeds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from commkit import ops

CPU = torch.device("cpu")
M32, M64 = 2**32 - 1, 2**64 - 1


def expected_noise(seed: int, index: int) -> float:
    """The same hash in unsigned integers: splitmix64 makes two keys, a 32-bit finaliser mixes them in."""
    z = (seed + 1) * 0x9E3779B97F4A7C15 & M64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & M64
    z = (z ^ z >> 27) * 0x94D049BB133111EB & M64
    z ^= z >> 31
    h = (index + (z & M32)) & M32
    h ^= h >> 16
    h = h * 0x7FEB352D & M32
    h = (h + (z >> 32)) & M32
    h ^= h >> 15
    h = h * 0x846CA68B & M32
    h ^= h >> 16
    return (h >> 8) / 2**24


@pytest.mark.parametrize("seed", [0, 1, 2, 12345, 2**31 - 1, 2**40 + 3])
def test_known_values(seed: int) -> None:
    noise = ops.uniform_noise(300, seed, CPU)
    assert noise.dtype == torch.float32
    assert noise.tolist() == [expected_noise(seed, i) for i in range(300)]


def test_an_element_depends_on_seed_and_index_alone() -> None:
    long = ops.uniform_noise(5000, 7, CPU)
    for n in (0, 1, 17, 4999):
        assert torch.equal(ops.uniform_noise(n, 7, CPU), long[:n])


def test_torchs_generator_is_not_touched() -> None:
    before = torch.get_rng_state()
    ops.uniform_noise(1000, 1, CPU)
    ops.stratified_indices(1000, 10, 1, CPU)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, 1, 99])
def test_distribution_is_uniform(seed: int) -> None:
    n, cells = 200_000, 64
    noise = ops.uniform_noise(n, seed, CPU).double()
    assert float(noise.min()) >= 0
    assert float(noise.max()) < 1
    # All bounds are 5 standard deviations.
    assert abs(noise.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert abs(noise.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    counts = torch.histc(noise, cells, 0, 1)
    chi_square = ((counts - n / cells) ** 2 / (n / cells)).sum()
    assert abs(chi_square - (cells - 1)) < 5 * math.sqrt(2 * (cells - 1))
    for lag in (1, 2, 8, 256):
        product = (noise[lag:] - 0.5) * (noise[:-lag] - 0.5) * 12
        assert abs(product.mean()) < 5 / math.sqrt(n - lag)


def test_streams_of_two_seeds_are_not_shifted_copies() -> None:
    """Two neighbours in one stream never are neighbours in another one."""
    seen: set[tuple[float, float]] = set()
    n, seeds = 2000, 20
    for seed in range(seeds):
        noise = ops.uniform_noise(n, seed, CPU).tolist()
        seen.update(itertools.pairwise(noise))
    assert len(seen) == seeds * (n - 1)


def test_streams_of_neighbouring_seeds_are_uncorrelated() -> None:
    n = 100_000
    streams = torch.stack([ops.uniform_noise(n, seed, CPU).double() for seed in range(8)])
    correlation = torch.corrcoef(streams) - torch.eye(8, dtype=torch.float64)
    assert correlation.abs().max() < 5 / math.sqrt(n)

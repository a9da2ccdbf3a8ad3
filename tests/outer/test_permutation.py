"""Choices that all ranks make alike, held to numbers that others computed and to a shuffle by hand."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from commkit.outer import pairing
from commkit.outer.permutation import permutation, salted, splitmix64, uniform
from tests.harness import run_ranks


def test_the_generator_is_splitmix64() -> None:
    """The first numbers of the sequence as published with the generator (seeds 0 and 1234567)."""
    assert splitmix64(0, 0) == 0xE220A8397B1DCDAF
    assert splitmix64(0, 1) == 0x6E789E6AA1B965F4
    assert splitmix64(0, 2) == 0x06C45D188009454F
    assert [splitmix64(1234567, k) for k in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_a_permutation_by_hand() -> None:
    """Seed 0, n = 3. Number 2 of the sequence leaves 1 when divided by three (its decimal digits add up to
    91), so places 2 and 1 swap: 0 2 1. Number 1 is even, so places 1 and 0 swap: 2 0 1."""
    assert sum(map(int, str(0x06C45D188009454F))) == 91
    assert permutation(0, n=3) == [2, 0, 1]


def test_salts_are_seeds_of_their_own() -> None:
    assert salted(5) == 5
    assert salted(5, 3) == splitmix64(5, 3)
    assert salted(5, 3, 4) == splitmix64(splitmix64(5, 3), 4)
    drawn = {salted(seed, r, s) for seed in range(4) for r in range(30) for s in range(30)}
    assert len(drawn) == 4 * 30 * 30
    assert salted(2**64 + 5, 3) == salted(5, 3)
    assert permutation(1, 2, 3, n=20) != permutation(1, 3, 2, n=20)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 8, 33])
def test_every_rank_is_there_once(n: int) -> None:
    for r in range(20):
        assert sorted(permutation(7, r, n=n)) == list(range(n))


def test_all_orders_are_equally_likely() -> None:
    draws = 24_000
    counts = Counter(tuple(permutation(11, r, n=4)) for r in range(draws))
    assert len(counts) == 24
    chi_square = sum((c - draws / 24) ** 2 / (draws / 24) for c in counts.values())
    assert (
        chi_square < 53.5
    )  # 23 degrees of freedom exceed it once in 3000 seeds, and this seed is fixed


def test_uniform_numbers_fill_the_interval() -> None:
    drawn = sorted(uniform(3, r) for r in range(5000))
    assert 0 <= drawn[0] < drawn[-1] < 1
    # Kolmogorov and Smirnov: exceeded once in 3000 seeds
    assert max(abs(x - k / 5000) for k, x in enumerate(drawn)) < 2.1 / 5000**0.5


def _everything(rank: int, world_size: int) -> object:
    return [
        permutation(9, 4, n=13),
        pairing.random_pairs(7, 1, 2),
        pairing.round_robin(9, 3),
        uniform(1, 2, 3),
    ]


def test_processes_agree_with_each_other_and_with_this_one() -> None:
    assert run_ranks(_everything, 3) == [_everything(0, 1)] * 3


def test_a_negative_number_of_ranks_is_an_error() -> None:
    with pytest.raises(ValueError, match="n=-1 must be >= 0"):
        permutation(0, n=-1)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_random_groups_hold_everybody_once(n: int, size: int) -> None:
    for r in range(10):
        groups = pairing.random_groups(n, size, 5, r)
        assert sorted(itertools.chain(*groups)) == list(range(n))
        assert [len(g) for g in groups] == [size] * (n // size) + [n % size] * (n % size > 0)


def test_random_pairs_are_the_two_halves_of_the_permutation() -> None:
    order = permutation(5, 6, n=7)
    partners = pairing.random_pairs(7, 5, 6)
    for k in range(3):
        assert partners[order[k]] == order[k + 3]
    assert partners[order[6]] == order[6]


def test_a_group_of_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="group size 0 must be >= 1; use 2"):
        pairing.random_groups(4, 0, 1)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 16])
def test_round_robin_lets_every_pair_meet_once(n: int) -> None:
    rounds = max(1, n - 1 + n % 2)
    met: Counter[tuple[int, int]] = Counter()
    byes: Counter[int] = Counter()
    for q in range(rounds):
        partners = pairing.round_robin(n, q)
        assert all(partners[partners[i]] == i for i in range(n))
        met.update((i, j) for i, j in enumerate(partners) if i < j)
        byes.update(i for i, j in enumerate(partners) if i == j)
        assert partners == pairing.round_robin(n, q + rounds)
    assert met == Counter(dict.fromkeys(itertools.combinations(range(n), 2), 1))
    assert byes == (Counter(dict.fromkeys(range(n), 1)) if n % 2 else Counter())


def test_hypercube_partners_differ_in_one_bit() -> None:
    assert pairing.hypercube(8, 0) == [1, 0, 3, 2, 5, 4, 7, 6]
    assert pairing.hypercube(8, 5) == [4, 5, 6, 7, 0, 1, 2, 3]
    assert pairing.hypercube(1, 3) == [0]


@pytest.mark.parametrize("n", [0, 3, 6, 12])
def test_a_hypercube_needs_a_power_of_two(n: int) -> None:
    with pytest.raises(
        ValueError, match=rf"hypercube over {n} ranks.*power of two; use round_robin"
    ):
        pairing.hypercube(n, 0)

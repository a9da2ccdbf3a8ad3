"""Mixing matrices: their laws, their gaps as tabulated, and how fast vectors really approach each other."""

from __future__ import annotations

import math

import numpy as np
import pytest

from commkit import registry
from commkit.config import ConfigError, build
from commkit.outer.pairing import round_robin
from commkit.outer.permutation import permutation
from commkit.outer.topologies import (
    Complete,
    DirectedGraph,
    Graph,
    Hypercube,
    Mixing,
    OnePeerExponential,
    RandomPairs,
    Ring,
    RoundRobin,
    StaticExponential,
    Topology,
    Torus,
)

LINE = ((0, 1), (1, 2), (2, 3), (3, 4), (1, 3))
ROUNDABOUT = ((0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (2, 4), (4, 0))
SIZES = (1, 2, 3, 5, 6, 8, 12)
CASES: list[tuple[Topology, int]] = [
    *(
        (topology, n)
        for topology in (
            Ring(),
            StaticExponential(),
            OnePeerExponential(),
            RandomPairs(3),
            RoundRobin(),
            Complete(),
        )
        for n in SIZES
    ),
    *((Hypercube(), n) for n in (1, 2, 8, 16)),
    *((Torus(r, c), r * c) for r, c in ((1, 1), (2, 2), (2, 4), (3, 3), (4, 4), (1, 5))),
    (Graph(LINE), 5),
    (DirectedGraph(ROUNDABOUT), 5),
]
ONE_WAY = (StaticExponential, OnePeerExponential, DirectedGraph)


def each(cases: list[tuple[Topology, int]]) -> pytest.MarkDecorator:
    ids = [f"{type(t).__name__}-{n}" for t, n in cases]
    return pytest.mark.parametrize(("topology", "n"), cases, ids=ids)


every_case = each(CASES)
DOUBLY_STOCHASTIC = [case for case in CASES if not isinstance(case[0], DirectedGraph)]
PERIODIC = [case for case in DOUBLY_STOCHASTIC if not isinstance(case[0], RandomPairs)]


def start(n: int, width: int = 40) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, width))


def distance(x: np.ndarray) -> float:
    return float(np.linalg.norm(x - x.mean(0)))


def test_every_registered_topology_has_a_case() -> None:
    assert {type(t) for t, _ in CASES} == {
        registry.lookup("topology", name) for name in registry.names("topology")
    }


@every_case
def test_weights_are_shares(topology: Topology, n: int) -> None:
    mixing = topology.mixing(n)
    for r in range(mixing.period or 50):
        matrix = mixing.matrix(r)
        assert matrix.shape == (n, n)
        assert matrix.min() >= 0
        assert (np.diag(matrix) > 0).all()  # nobody forgets all of its own
        np.testing.assert_allclose(matrix.sum(0), 1, rtol=0, atol=1e-14)
        if not isinstance(topology, DirectedGraph):
            np.testing.assert_allclose(matrix.sum(1), 1, rtol=0, atol=1e-14)
        if not isinstance(topology, ONE_WAY):
            np.testing.assert_array_equal(matrix, matrix.T)
        if mixing.period:
            np.testing.assert_array_equal(matrix, mixing.matrix(r + 7 * mixing.period))
    assert mixing.column_stochastic
    assert mixing.doubly_stochastic == mixing.row_stochastic
    assert mixing.doubly_stochastic != isinstance(topology, DirectedGraph)
    if n > 3:  # of fewer, every link of these goes both ways
        assert mixing.symmetric != isinstance(topology, ONE_WAY)


@every_case
def test_neighbours_are_the_matrix(topology: Topology, n: int) -> None:
    """What ranks do by their neighbours alone is the matrix product, and sends and receives match."""
    mixing, x = topology.mixing(n), start(n, 3)
    for r in range(4):
        parts = [mixing.neighbours(rank, r) for rank in range(n)]
        mixed = [
            p.self_weight * x[rank] + sum(w * x[peer] for peer, w in p.receives.items())
            for rank, p in enumerate(parts)
        ]
        np.testing.assert_allclose(mixed, mixing.matrix(r) @ x, rtol=0, atol=1e-14)
        for rank, part in enumerate(parts):
            assert rank not in part.sends
            for peer, weight in part.sends.items():
                assert parts[peer].receives[rank] == weight
            assert sum(part.sends.values()) + part.self_weight == pytest.approx(1, abs=1e-14)


@each(DOUBLY_STOCHASTIC)
def test_the_mean_is_conserved_over_a_thousand_rounds(topology: Topology, n: int) -> None:
    mixing = topology.mixing(n)
    x = first = start(n)
    for r in range(1000):
        x = mixing.matrix(r) @ x
    np.testing.assert_allclose(x.mean(0), first.mean(0), rtol=0, atol=1e-12)
    assert distance(x) < 1e-3 * distance(first) or n == 1


@every_case
def test_push_sum_conserves_mass_and_finds_the_mean(topology: Topology, n: int) -> None:
    mixing = topology.mixing(n)
    x, mass = first, _ = start(n), np.ones(n)
    for r in range(1000):
        matrix = mixing.matrix(r)
        x, mass = matrix @ x, matrix @ mass
        assert mass.sum() == pytest.approx(n, abs=1e-11)
    np.testing.assert_allclose(x.sum(0), first.sum(0), rtol=0, atol=1e-11)
    ratio = x / mass[:, None]
    np.testing.assert_allclose(ratio, np.tile(first.mean(0), (n, 1)), rtol=0, atol=1e-2)


@each(PERIODIC)
def test_vectors_approach_each_other_as_fast_as_the_gap_says(topology: Topology, n: int) -> None:
    mixing, x = topology.mixing(n), start(n)
    assert mixing.period is not None
    for _ in range(5):
        before = distance(x)
        for r in range(mixing.period):
            x = mixing.matrix(r) @ x
        bound = (1 - mixing.gap()) ** (2 * mixing.period)
        assert distance(x) ** 2 <= bound * before**2 * (1 + 1e-9) + 1e-20


@pytest.mark.parametrize(
    ("topology", "n", "gap"),
    [
        (Ring(), 8, ".195"),
        (Ring(), 16, ".051"),
        (Ring(), 64, ".0032"),
        (Torus(4, 4), 16, ".40"),
        (Torus(4, 8), 32, ".117"),
        (Torus(8, 8), 64, ".117"),
        (StaticExponential(), 8, ".5"),
        (StaticExponential(), 16, ".4"),
        (StaticExponential(), 64, ".286"),
    ],
)
def test_gaps_as_tabulated(topology: Topology, n: int, gap: str) -> None:
    digits = len(gap) - 1
    assert round(topology.mixing(n).gap(), digits) == float(gap)


@pytest.mark.parametrize("n", [4, 8, 16, 64])
def test_gaps_in_closed_form(n: int) -> None:
    ring = 2 / 3 * (1 - math.cos(2 * math.pi / n))
    assert Ring().mixing(n).gap() == pytest.approx(ring, abs=1e-12)
    assert StaticExponential().mixing(n).gap() == pytest.approx(2 / (1 + math.log2(n)), abs=1e-12)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32])
def test_one_peer_exponential_is_exact_only_for_powers_of_two(n: int) -> None:
    mixing = OnePeerExponential().mixing(n)
    rounds = math.ceil(math.log2(n))
    power = 2**rounds == n
    assert mixing.exact_after() == (rounds if power else None)
    assert (mixing.gap() > 1 - 1e-4) == power
    x = start(n)
    for r in range(rounds):
        x = mixing.matrix(r) @ x
    assert (distance(x) < 1e-13) == power


@pytest.mark.parametrize(("n", "left"), [(6, ".083"), (12, ".042")])
def test_what_one_peer_exponential_leaves_otherwise(n: int, left: str) -> None:
    """The largest error of a weight after L rounds."""
    mixing = OnePeerExponential().mixing(n)
    product = mixing.product(0, mixing.period or 0)
    assert round(float(np.abs(product - 1 / n).max()), 3) == float(left)


def test_multiple_gossip_steps() -> None:
    """Of a graph they are the matrix's power; of one-peer exponential, log2 n are the mean, wherever they
    begin."""
    ring = Ring().mixing(6)
    power = np.linalg.matrix_power(ring.matrix(0), 4)
    np.testing.assert_allclose(ring.product(12, 4), power, rtol=0, atol=1e-15)
    assert np.linalg.norm(power - 1 / 6, 2) == pytest.approx((1 - ring.gap()) ** 4)
    for first in range(5):
        product = OnePeerExponential().mixing(8).product(first, 3)
        np.testing.assert_array_equal(product, np.full((8, 8), 1 / 8))
    np.testing.assert_array_equal(ring.product(3, 0), np.eye(6))


def test_hypercube_and_complete_are_exact() -> None:
    for n in (2, 4, 16):
        assert Hypercube().mixing(n).exact_after() == math.log2(n)
        assert Complete().mixing(n).exact_after() == 1
    assert Ring().mixing(3).exact_after() == 1
    assert Ring().mixing(4).exact_after() is None
    assert RandomPairs().mixing(2).exact_after() is None  # says nothing of a drawn schedule
    assert Ring().mixing(1).exact_after() == 0


@pytest.mark.parametrize("n", [3, 4, 7, 8])
def test_random_pairs_contract_as_expected(n: int) -> None:
    """The measured mean of squared contractions against (n-2)/(2(n-1)), within five standard errors."""
    topology, factors = RandomPairs(17), []
    x = start(n)
    for r in range(4000):
        factors.append((distance(topology.matrix(n, r) @ x) / distance(x)) ** 2)
    expected = (n - 2) / (2 * (n - 1)) if n % 2 == 0 else 0.5
    error = np.std(factors) / len(factors) ** 0.5
    assert abs(np.mean(factors) - expected) < 5 * error + 1e-12
    assert (1 - topology.mixing(n).gap()) ** 2 == pytest.approx(expected, abs=1e-12)
    drawn = np.mean([topology.matrix(n, r) for r in range(4000)], axis=0)
    np.testing.assert_allclose(drawn, topology.mean_matrix(n), rtol=0, atol=0.04)


def test_pairs_are_those_of_the_schedules() -> None:
    mixing = RoundRobin().mixing(7)
    for r in range(7):
        for rank, partner in enumerate(round_robin(7, r)):
            part = mixing.neighbours(rank, r)
            assert part.sends == part.receives == ({} if partner == rank else {partner: 0.5})
    order = permutation(3, 9, n=6)
    part = RandomPairs(3).mixing(6).neighbours(order[1], 9)
    assert part.receives == {order[4]: 0.5}


def test_one_peer_exponential_sends_forward() -> None:
    part = OnePeerExponential().mixing(8).neighbours(6, 2)
    assert part.sends == {2: 0.5}
    assert part.receives == {2: 0.5}
    part = OnePeerExponential().mixing(8).neighbours(6, 4)
    assert part.sends == {0: 0.5}
    assert part.receives == {4: 0.5}


def test_coincident_neighbours_of_a_torus_add_up() -> None:
    np.testing.assert_allclose(
        Torus(2, 2).mixing(4).matrix(0),
        np.array([[1, 2, 2, 0], [2, 1, 0, 2], [2, 0, 1, 2], [0, 2, 2, 1]]) / 5,
    )


def test_metropolis_weights_by_hand() -> None:
    """A star: the centre's degree decides every link."""
    weights = Graph([[0, 1], [0, 2], [3, 0], [0, 3]]).mixing(4).matrix(0)
    quarter = 1 / 4
    expected = np.diag([quarter, 3 * quarter, 3 * quarter, 3 * quarter])
    expected[0, 1:] = expected[1:, 0] = quarter
    np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-15)


def test_push_sum_shares_by_hand() -> None:
    """Rank 0 deals a third to itself, 1 and 2; rank 1 a half to itself and to 0."""
    shares = DirectedGraph([[0, 1], [0, 2], [1, 0], [2, 0]]).mixing(3).matrix(0)
    expected = [[1 / 3, 1 / 2, 1 / 2], [1 / 3, 1 / 2, 0], [1 / 3, 0, 1 / 2]]
    np.testing.assert_allclose(shares, expected, rtol=0, atol=1e-15)


def test_the_gap_of_push_sum_is_its_rate_in_the_long_run() -> None:
    mixing = DirectedGraph(ROUNDABOUT).mixing(5)
    x, mass = start(5), np.ones(5)
    target, errors, matrix = x.mean(0), [], mixing.matrix(0)
    for _ in range(60):
        x, mass = matrix @ x, matrix @ mass
        errors.append(float(np.linalg.norm(x / mass[:, None] - target)))
    rate = (errors[49] / errors[19]) ** (1 / 30)
    assert rate == pytest.approx(1 - mixing.gap(), rel=0.02)  # 30 rounds of a rotating error


def links_of(mixing: Mixing, r: int) -> set[tuple[int, int]]:
    """(to, from) pairs of a round."""
    return {(i, j) for i in mixing.ranks for j in mixing.neighbours(i, r).receives}


@pytest.mark.parametrize(
    ("topology", "n", "lost"),
    [
        (Ring(), 6, {2}),
        (Torus(3, 3), 9, {0, 4}),
        (Hypercube(), 8, {5}),
        (Graph(LINE), 5, {2}),
        (StaticExponential(), 8, {1, 6}),
        (OnePeerExponential(), 8, {0}),
        (RandomPairs(1), 6, {3}),
        (RoundRobin(), 6, {0, 5}),
        (Complete(), 4, {3}),
    ],
)
def test_survivors_go_on(topology: Topology, n: int, lost: set[int]) -> None:
    whole = topology.mixing(n)
    left = whole.without(lost)
    assert left.ranks == tuple(sorted(set(range(n)) - lost))
    assert left.doubly_stochastic
    assert left.symmetric == whole.symmetric
    x = first = start(len(left.ranks))
    for r in range(400):
        x = left.matrix(r) @ x
        if topology.links_are_fixed:
            assert links_of(left, r) <= links_of(whole, r)
    np.testing.assert_allclose(x.mean(0), first.mean(0), rtol=0, atol=1e-13)
    assert distance(x) < 1e-3 * distance(first)
    with pytest.raises(ValueError, match=rf"rank {min(lost)} takes no part"):
        left.neighbours(min(lost), 0)


def test_losses_one_by_one_are_losses_together() -> None:
    for topology in (Torus(3, 3), RoundRobin(), StaticExponential()):
        one_by_one = topology.mixing(9).without({2}).without({7})
        together = topology.mixing(9).without({7, 2})
        for r in range(8):
            np.testing.assert_array_equal(one_by_one.matrix(r), together.matrix(r))


def test_a_ring_cut_twice_is_not_connected() -> None:
    with pytest.raises(
        ValueError, match=r"Ring over 6 ranks is not connected.*\[1, 2\] and \[4, 5\]"
    ):
        Ring().mixing(6).without({0, 3})
    assert Ring().mixing(6).without({0, 1}).ranks == (2, 3, 4, 5)


def test_the_last_one_is_alone_and_nobody_is_an_error() -> None:
    alone = RandomPairs().mixing(3).without({0, 2})
    assert alone.matrix(5) == np.ones((1, 1))
    assert alone.gap() == 1
    with pytest.raises(ValueError, match="nobody left"):
        alone.without({1})
    with pytest.raises(ValueError, match=r"ranks \[0\] take no part"):
        alone.without({0, 1})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hypercube().mixing(6), "hypercube over 6 ranks.*power of two"),
        (lambda: Torus(2, 3).mixing(8), "rows=2 x columns=3 over 8 ranks: the product must be 8"),
        (lambda: Torus(0, 3), "rows=0, columns=3 must be >= 1"),
        (lambda: Ring().mixing(0), "world_size=0 must be >= 1"),
        (lambda: Graph([[0, 1], [2, 3]]).mixing(5), r"\[0, 1\] and \[2, 3\] and \[4\] do not all"),
        (
            lambda: Graph([[0, 5]]).mixing(3),
            r"edges: \[0, 5\] must be two different ranks from 0 to 2",
        ),
        (lambda: Graph([[1, 1]]).mixing(3), r"edges: \[1, 1\] must be two different"),
        (lambda: Graph([[1]]).mixing(3), r"edges: \[1\] must be two different"),
        (lambda: DirectedGraph([[0, 1], [1, 2]]).mixing(3), r"\[0\] and \[1\] and \[2\]"),
    ],
)
def test_what_does_not_exist_is_an_error(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("block", "topology"),
    [
        ("ring", Ring()),
        ({"name": "torus", "rows": 2, "columns": 4}, Torus(2, 4)),
        ({"name": "random_pairs", "seed": 5}, RandomPairs(5)),
        ({"name": "graph", "edges": [[0, 1], [1, 2]]}, Graph(((0, 1), (1, 2)))),
    ],
)
def test_yaml_builds_them_by_name(block, topology: Topology) -> None:
    built = build("topology", block, "outer.topology")
    assert built == topology
    assert build("topology", registry.spec(built), "again") == topology


def test_yaml_says_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="did you mean 'ring'"):
        build("topology", "rign", "outer.topology")
    with pytest.raises(ConfigError, match=r"outer\.topology\.columns is missing"):
        build("topology", {"name": "torus", "rows": 2}, "outer.topology")

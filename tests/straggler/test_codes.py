"""Gradient codes: every set of stragglers decodes exactly, and what cannot be built says so."""

import itertools
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch

from commkit import registry
from commkit.config import ConfigError, build
from commkit.straggler import (
    ConditioningWarning,
    CyclicMDS,
    CyclicRandom,
    FractionalRepetition,
    GradientCode,
    is_usable,
    make_code,
)
from commkit.straggler.codes import cyclic_matrix

G = np.array([1.0, 2.0, 3.0, 4.0])


def cyclic(n: int, s: int) -> GradientCode:
    """The deterministic code where it is real, else a random one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConditioningWarning)
        return CyclicMDS(n, s) if s == 0 or (n - s) % 2 else CyclicRandom(n, s, draws=10)


def patterns(n: int, s: int) -> list[tuple[int, ...]]:
    return [p for k in range(s + 1) for p in itertools.combinations(range(n), k)]


def worst_error(code: GradientCode) -> tuple[float, int]:
    """Largest relative error of a decoded sum over every set of up to s stragglers, and how many there are."""
    n, s = code.num_workers, code.num_stragglers
    g = np.random.RandomState(7).standard_normal((code.num_partitions, 5))
    f, everyone, weights = code.matrix @ g, set(range(n)), []
    for missing in patterns(n, s):
        a = code.decode_weights(everyone.difference(missing))
        assert a is not None, (code.name, n, s, missing)
        assert not a[list(missing)].any()
        weights.append(a)
    errors = np.linalg.norm(np.array(weights) @ f - g.sum(axis=0), axis=1)
    return float(errors.max() / np.linalg.norm(g.sum(axis=0))), len(weights)


@pytest.mark.parametrize("n", range(1, 13))
def test_every_set_of_stragglers_decodes_exactly(
    n: int, record_property: Callable[[str, object], None]
) -> None:
    counted = {"fractional_repetition": 0, "cyclic": 0}
    for s in range(n):
        if n % (s + 1) == 0:
            error, count = worst_error(FractionalRepetition(n, s))
            counted["fractional_repetition"] += count
            assert error <= 1e-15
            assert count == sum(math.comb(n, k) for k in range(s + 1))
        error, count = worst_error(cyclic(n, s))
        counted["cyclic"] += count
        assert error <= 1e-9, (n, s, error)
    print(f"n={n}: straggler sets decoded: {counted}")
    record_property("decoded_straggler_sets", counted)
    assert counted["cyclic"] == sum(math.comb(n, k) * (n - k) for k in range(n))


@pytest.mark.parametrize("make", [FractionalRepetition, CyclicMDS])
def test_worked_example_of_four_workers_and_one_straggler(make: type[GradientCode]) -> None:
    code = make(4, 1)  # type: ignore[call-arg]
    expected = {
        FractionalRepetition: [[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]],
        CyclicMDS: [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]],
    }[make]
    np.testing.assert_allclose(code.matrix, expected, atol=1e-15)
    sent = {FractionalRepetition: [3, 7, 3, 7], CyclicMDS: [3, 5, 7, 5]}[make]
    np.testing.assert_allclose(code.matrix @ G, sent)
    if make is CyclicMDS:
        rows = [[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]]
        for missing, weights in enumerate(rows):
            a = code.decode_weights([i for i in range(4) if i != missing])
            np.testing.assert_allclose(a, weights, atol=1e-12)
    else:
        for one, other in itertools.product((0, 2), (1, 3)):
            assert (code.decode_weights([one, other]) == np.eye(4)[[one, other]].sum(0)).all()
        assert code.decode_weights([0, 2]) is None


def test_worked_examples_of_the_random_construction() -> None:
    one = cyclic_matrix(np.array([[1.0, 2, 3, -6]]))
    np.testing.assert_allclose(
        one, [[1, -1 / 2, 0, 0], [0, 1, -2 / 3, 0], [0, 0, 1, 1 / 2], [6, 0, 0, 1]], atol=1e-14
    )
    code = with_matrix(one, 1)
    expected = [[0, 1, 5 / 3, 1 / 6], [-2, 0, 1, 1 / 2], [-5, -3 / 2, 0, 1], [1, 3 / 2, 2, 0]]
    for missing, weights in enumerate(expected):
        a = code.decode_weights([i for i in range(4) if i != missing])
        np.testing.assert_allclose(a, weights, atol=1e-12)
        assert a @ code.matrix @ G == pytest.approx(10)

    two = cyclic_matrix(np.array([[1.0, 1, -1, -1], [1, -2, 3, -2]]))
    rows = [[1, -4, -3, 0], [0, 1, 0.8, 0.2], [5, 0, 1, 4], [4 / 3, -1 / 3, 0, 1]]
    np.testing.assert_allclose(two, rows, atol=1e-14)
    code = with_matrix(two, 2)
    pairs = {
        (0, 1): (1, 5),
        (0, 2): (-1 / 4, 1 / 4),
        (0, 3): (-1 / 3, 1),
        (1, 2): (1, 0.2),
        (1, 3): (1.25, 0.75),
        (2, 3): (1, -3),
    }
    for arrived, weights in pairs.items():
        a = code.decode_weights(arrived)
        np.testing.assert_allclose(a[list(arrived)], weights, atol=1e-12)


def with_matrix(matrix: np.ndarray, s: int) -> CyclicRandom:
    """A code with this matrix in place of a drawn one."""
    code = object.__new__(CyclicRandom)
    super(CyclicRandom, code).__init__(len(matrix), s, matrix)
    return code


@pytest.mark.parametrize(
    ("n", "s", "expected"),
    [(4, 1, 1), (5, 2, 3), (8, 3, 10.7), (16, 3, 50), (16, 5, 366), (32, 3, 205)],
)
def test_amplification_of_the_deterministic_code(n: int, s: int, expected: float) -> None:
    assert CyclicMDS(n, s).amplification() == pytest.approx(expected, rel=0.01)


def test_amplification_is_the_worst_over_all_sets() -> None:
    code = CyclicMDS(8, 3)
    worst = 0.0
    for missing in itertools.combinations(range(8), 3):
        a = code.decode_weights(set(range(8)) - set(missing))
        worst = max(worst, float((np.abs(a) @ np.abs(code.matrix)).max()))
    assert code.amplification() == pytest.approx(worst)


def test_random_codes_are_the_best_of_many_and_warn() -> None:
    with pytest.warns(ConditioningWarning, match="amplifies rounding errors"):
        best = CyclicRandom(16, 3, draws=50)
    with pytest.warns(ConditioningWarning):
        single = CyclicRandom(16, 3, draws=1)
    assert best.amplification() < single.amplification()
    with pytest.raises(ValueError, match="leaves nothing of float32 gradients"):
        CyclicMDS(256, 13)
    assert not is_usable(256, 13)
    assert is_usable(256, 15)


def test_equal_arguments_give_equal_codes_and_the_digest_tells_others_apart() -> None:
    digests = [
        code.digest
        for code in (
            CyclicRandom(6, 2, seed=1),
            CyclicRandom(6, 2, seed=2),
            FractionalRepetition(6, 2),
            FractionalRepetition(6, 1),
            CyclicMDS(6, 1),
        )
    ]
    assert len(set(digests)) == len(digests)
    assert CyclicRandom(6, 2, seed=1).digest == digests[0]


@pytest.mark.parametrize(
    "code", [FractionalRepetition(12, 2), CyclicMDS(12, 3)], ids=lambda c: c.name
)
def test_partitions_are_on_s_plus_one_workers(code: GradientCode) -> None:
    held = [j for i in range(12) for j in code.partitions_of(i)]
    assert [held.count(j) for j in range(12)] == [code.num_stragglers + 1] * 12
    assert code.replication == code.num_stragglers + 1
    assert code.load == pytest.approx((code.num_stragglers + 1) / 12)
    for i in range(12):
        runs = code.runs_of(i)
        covered = {j: c for first, last, c in runs for j in range(first, last)}
        assert covered == code.coefficients_of(i)


def test_copies_of_a_block_are_on_different_nodes_when_ranks_are_numbered_by_node() -> None:
    code, per_node = FractionalRepetition(16, 3), 4
    for block in range(code.num_blocks):
        holders = [i for i in range(16) if block * 4 in code.partitions_of(i)]
        assert len({i // per_node for i in holders}) == 4
    assert len(code.runs_of(0)) == 1  # one pass over the block


def test_more_than_s_stragglers_decode_where_the_code_allows_it() -> None:
    code = FractionalRepetition(12, 2)
    assert code.decode_weights([0, 5, 10, 3]) is not None  # 8 of 12 are missing
    assert code.decode_weights([0, 4, 8, 1, 5, 9, 2, 6, 10]) is None  # all of block 3
    ring = CyclicMDS(4, 1)
    assert ring.can_decode([1, 3])
    assert not ring.can_decode([0, 1])


def test_more_arrivals_than_needed_amplify_less() -> None:
    code = CyclicMDS(8, 3)
    norms = [np.linalg.norm(code.decode_weights(range(k, 8))) for k in range(4)]
    assert norms == sorted(norms)
    a = code.decode_weights(range(8))
    assert a is code.decode_weights(list(range(8)))  # kept
    with pytest.raises(ValueError, match="read-only"):
        a[0] = 1


def test_approximate_decoding_weighs_all_data_as_exact_decoding_does() -> None:
    code = CyclicMDS(8, 1)
    exact, residual = code.approximate_weights([0, 2, 4, 6, 7])
    assert residual == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(exact @ code.matrix, np.ones(8), atol=1e-12)
    weights, residual = code.approximate_weights([0, 1, 2])
    assert code.decode_weights([0, 1, 2]) is None
    assert residual > 1
    assert (weights @ code.matrix).sum() == pytest.approx(8)
    assert not weights[3:].any()
    with pytest.raises(ValueError, match="arrived is empty"):
        code.approximate_weights([])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_encoding_accumulates_in_float32_at_least(dtype: torch.dtype) -> None:
    code = CyclicMDS(5, 2)
    generator = torch.Generator().manual_seed(0)
    g = [torch.randn(3, 4, generator=generator).to(dtype) for _ in range(5)]
    sent = [code.encode(i, {j: g[j] for j in code.partitions_of(i)}) for i in range(5)]
    assert all(f.dtype == torch.promote_types(dtype, torch.float32) for f in sent)
    exact = sum(x.double() for x in g)
    a = code.decode_weights([0, 2, 4])
    decoded = sum(float(a[i]) * sent[i].double() for i in (0, 2, 4))
    torch.testing.assert_close(decoded, exact, rtol=1e-5, atol=1e-5)


def test_encoding_says_what_is_wrong() -> None:
    code, x = CyclicMDS(4, 1), torch.zeros(2)
    with pytest.raises(ValueError, match=r"no partition 1, but worker 0 computes \(0, 1\)"):
        code.encode(0, {0: x})
    with pytest.raises(ValueError, match=r"gradients\[1\] has shape \(3,\)"):
        code.encode(0, {0: x, 1: torch.zeros(3)})
    with pytest.raises(ValueError, match=r"torch\.int64; give a float dtype"):
        code.encode(0, {0: x.long(), 1: x.long()})
    with pytest.raises(ValueError, match=r"worker=4 must be in 0\.\.3"):
        code.partitions_of(4)
    with pytest.raises(ValueError, match=r"worker 9 must be in 0\.\.3"):
        code.decode_weights([9])


def test_auto_takes_repetition_then_mds_then_random() -> None:
    assert make_code(12, 2).name == "fractional_repetition"
    assert make_code(8, 3).name == "fractional_repetition"
    assert make_code(10, 3).name == "cyclic_mds"
    assert make_code(5, 3).name == "cyclic_random"
    assert make_code(7, 0).name == "fractional_repetition"
    assert make_code(8, 3, "cyclic_mds").name == "cyclic_mds"


@pytest.mark.parametrize("name", ["auto", "fractional_repetition", "cyclic_mds", "cyclic_random"])
def test_yaml_names_a_family(name: str) -> None:
    family = build("code", name, "straggler.code")
    assert family.build(8, 1).num_workers == 8
    assert build("code", registry.spec(family), "again") == family
    assert name in registry.names("code")


def test_yaml_sets_fields_and_refuses_others() -> None:
    assert build("code", {"name": "cyclic_random", "seed": 3, "draws": 5}, "code").seed == 3
    with pytest.raises(ConfigError, match="did you mean 'cyclic_mds'"):
        build("code", "cyclic_mbs", "code")
    with pytest.raises(ConfigError, match=r"code\.seed: unknown field"):
        build("code", {"name": "cyclic_mds", "seed": 3}, "code")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FractionalRepetition(4, 4), r"num_stragglers=4 must be >= 0 and < num_workers=4"),
        (lambda: CyclicMDS(4, 5), r"num_stragglers=5 must be >= 0 and < num_workers=4"),
        (lambda: CyclicRandom(4, -1), r"num_stragglers=-1 must be >= 0"),
        (lambda: make_code(0, 0), r"num_workers=0 must be >= 1"),
        (
            lambda: FractionalRepetition(8, 2),
            r"num_workers=8 must be divisible by num_stragglers \+ 1 = 3 .*use code 'cyclic_mds'",
        ),
        (lambda: CyclicMDS(8, 2), r"must be odd for cyclic_mds .*num_stragglers=3"),
        (lambda: CyclicRandom(4, 1, draws=0), r"draws=0 must be >= 1"),
    ],
)
def test_bad_numbers_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(("n", "s"), [(6, 1), (9, 2), (12, 3)])
def test_replicas_take_each_others_place_in_the_sum(n: int, s: int) -> None:
    code = FractionalRepetition(n, s)
    for late in itertools.combinations(range(n), s):
        terms = code.terms([i for i in range(n) if i not in late])
        assert terms is not None
        assert [code.partitions_of(i)[0] for i, _ in terms] == list(range(0, n, s + 1))
        assert all(weight == 1.0 for _, weight in terms)
    assert code.terms([0]) is None

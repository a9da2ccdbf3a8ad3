"""Robust averages: laws of each rule, cases by hand, and what attackers get done."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import get_args

import pytest
import torch

from commkit.aggregators.robust_rules import Rule, check_num_faulty, decide, robust_mean
from commkit.types import NonFiniteError
from tests.attacks import ATTACKS, little_is_enough

from .inputs import sample

RULES: tuple[Rule, ...] = get_args(Rule)
ROBUST: tuple[Rule, ...] = tuple(rule for rule in RULES if rule != "mean")
SELECT: tuple[Rule, ...] = ("krum", "multi_krum", "nearest")
every_robust_rule = pytest.mark.parametrize("rule", ROBUST)


def vectors(n: int, p: int = 30, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return sample((n, p), seed, dtype)


def mean_of(rows: torch.Tensor) -> torch.Tensor:
    return sum(row / len(rows) for row in rows)


# ---- by hand


def test_nearest_by_hand() -> None:
    """Own 0; 0.1, -0.2, 100 and 0.3 arrived first of six ranks, one of which may be faulty."""
    stack = torch.tensor([[0.0], [0.1], [-0.2], [100.0], [0.3]], dtype=torch.float64)
    assert float(robust_mean(stack, "nearest", 1, own=0)) == pytest.approx(0.05, abs=1e-15)


def test_median_and_trimmed_mean_by_hand() -> None:
    stack = torch.tensor([[5.0, -1.0], [1.0, 2.0], [2.0, 9.0], [3.0, 0.0], [100.0, 1.0]])
    assert robust_mean(stack, "median", 2).tolist() == [3, 1]
    assert robust_mean(stack[:4], "median", 1).tolist() == [2.5, 1]
    torch.testing.assert_close(
        robust_mean(stack, "trimmed_mean", 1), torch.tensor([10 / 3, 1.0]), rtol=0, atol=1e-6
    )


def test_krum_by_hand() -> None:
    """n = 5, f = 1: sums of the squared distances to the two nearest are 5, 2, 2, 5 and 97^2 + 98^2."""
    stack = torch.tensor([[0.0], [1.0], [2.0], [3.0], [100.0]])
    assert decide([lambda: stack], "krum", 1).members == (1,)  # 1 and 2 tie at 2
    assert decide([lambda: stack], "multi_krum", 1).members == (0, 1, 2, 3)
    shifted = torch.tensor([[0.0], [1.1], [2.0], [3.0], [100.0]])
    # 1.1 -> 1.21 + 0.81 = 2.02; 2.0 -> 0.81 + 1 = 1.81
    assert decide([lambda: shifted], "krum", 1).members == (2,)


def test_norm_clip_by_hand() -> None:
    """Median 2; distances 2, 1, 0, 1, 98; the fourth smallest is 2, so 100 is pulled in to 4."""
    stack = torch.tensor([[0.0], [1.0], [2.0], [3.0], [100.0]], dtype=torch.float64)
    assert float(robust_mean(stack, "norm_clip", 1)) == pytest.approx((0 + 1 + 2 + 3 + 4) / 5)


def test_ties_go_to_the_lower_rank() -> None:
    stack = torch.tensor([[0.0], [1.0], [-1.0], [1.0], [-1.0], [1.0], [-1.0]])
    assert decide([lambda: stack], "nearest", 2, own=0).members == (0, 1, 2, 3, 4)
    same = torch.ones(7, 4)
    assert decide([lambda: same], "krum", 2).members == (0,)
    assert decide([lambda: same], "multi_krum", 2).members == (0, 1, 2, 3, 4)
    assert decide([lambda: same], "nearest", 2, own=6).members == (0, 1, 2, 3, 6)  # itself included


# ---- laws


@pytest.mark.parametrize("rule", [r for r in RULES if r not in ("median", "krum")])
@pytest.mark.parametrize("n", [3, 4, 7])
def test_without_faults_it_is_the_mean(rule: Rule, n: int) -> None:
    x = vectors(n, dtype=torch.float32)
    assert torch.equal(robust_mean(x, rule, 0), mean_of(x))


@every_robust_rule
@pytest.mark.parametrize("f", [1, 2])
@pytest.mark.parametrize("bad", [1e30, -1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_absurd_vectors_change_nothing_that_counts(
    rule: Rule, f: int, bad: float, dtype: torch.dtype
) -> None:
    """Whole vectors: what is left is an average of honest ones, and lies among their values."""
    n = 11
    for placed in itertools.combinations(range(0, n, 3), f):
        x = vectors(n, dtype=dtype)
        honest = [i for i in range(n) if i not in placed]
        x[list(placed)] = bad
        verdict = decide([lambda x=x: x], rule, f, own=honest[0])
        out = verdict.combine(x)
        if rule in SELECT:
            assert set(verdict.members) <= set(honest)
            assert len(verdict.members) == (1 if rule == "krum" else n - f)
            assert torch.equal(out, mean_of(x[list(verdict.members)]))
        elif rule == "norm_clip":
            centre = x[honest].median(0).values
            spread = max(float((x[i] - centre).norm()) for i in honest)
            assert float((out - centre).norm()) <= 2 * spread
        else:
            assert bool((out >= x[honest].min(0).values).all())
            assert bool((out <= x[honest].max(0).values).all())
        if not math.isfinite(bad):
            assert set(verdict.members) <= set(honest)


@every_robust_rule
def test_one_bad_element_condemns_the_whole_vector(rule: Rule) -> None:
    """It is left out of tensors, too, in which it is finite."""
    a, b = vectors(7, seed=1), vectors(7, seed=2)
    a[3, 4] = math.nan
    verdict = decide([lambda: a, lambda: b], rule, 1, own=0)
    assert 3 not in verdict.members
    left = [i for i in range(7) if i != 3]
    whole = decide([lambda: a[left], lambda: b[left]], rule, 0, own=0)
    assert torch.equal(verdict.combine(b), whole.combine(b[left]))


@every_robust_rule
def test_suspects_are_as_bad_as_nan(rule: Rule) -> None:
    x = vectors(7)
    assert 2 not in decide([lambda: x], rule, 1, own=0, suspects=[2]).members


def test_distances_are_of_the_whole_model() -> None:
    """Rank 4 is a little off in every one of many tensors, nowhere by more than others are in one."""
    tensors = [0.01 * vectors(5, 4, seed) for seed in range(30)]
    for i, x in enumerate(tensors):
        x[4] += 0.095
        x[i % 4] += 0.1
    whole = decide([lambda x=x: x for x in tensors], "multi_krum", 1)
    assert whole.members == (0, 1, 2, 3)
    alone = {decide([lambda x=x: x], "multi_krum", 1).members for x in tensors}
    assert any(4 in members for members in alone)
    joined = torch.cat(tensors, 1)
    out = torch.cat([whole.combine(x) for x in tensors])
    assert torch.equal(out, robust_mean(joined, "multi_krum", 1))


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_ranks_does_not_matter(rule: Rule) -> None:
    """Permuted ranks give a permuted verdict; sums differ by their order alone."""
    x, f = vectors(9), 0 if rule == "mean" else 2
    x[5] += 3
    reference = decide([lambda: x], rule, f, own=1)
    for seed in range(20):
        order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
        y, own = x[order], int((order == 1).nonzero())
        verdict = decide([lambda y=y: y], rule, f, own=own)
        assert sorted(int(order[i]) for i in verdict.members) == list(reference.members)
        torch.testing.assert_close(verdict.combine(y), reference.combine(x), rtol=0, atol=1e-14)


@every_robust_rule
def test_shifts_and_scales_pass_through(rule: Rule) -> None:
    x = vectors(9)
    shift, factor = vectors(1, seed=5), 8.0
    torch.testing.assert_close(
        robust_mean(factor * x + shift, rule, 2),
        factor * robust_mean(x, rule, 2) + shift[0],
        rtol=0,
        atol=1e-12,
    )


@every_robust_rule
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 4)])
def test_any_shape(rule: Rule, shape: tuple[int, ...]) -> None:
    x = sample((7, *shape), 1)
    out = robust_mean(x, rule, 1)
    assert out.shape == shape
    assert out.dtype == x.dtype
    assert x.equal(sample((7, *shape), 1))  # untouched


def test_vectors_at_the_end_of_the_range_do_not_make_nan() -> None:
    x = vectors(7, dtype=torch.float32)
    x[0], x[1] = 3.3e38, -3.3e38
    for rule in ROBUST:
        assert bool(robust_mean(x, rule, 2, own=4).isfinite().all())


def test_nearest_with_an_own_vector_that_is_not_finite() -> None:
    x = vectors(9)
    x[2], x[7] = math.nan, 50.0
    verdict = decide([lambda: x], "nearest", 2, own=2)
    assert verdict.members == (0, 1, 3, 4, 5, 6, 8)


def test_more_bad_vectors_than_allowed_are_an_error() -> None:
    x = vectors(7)
    x[[1, 4]] = math.nan
    for rule in ROBUST:
        with pytest.raises(NonFiniteError, match="2 of 7 ranks hold inf or NaN but num_faulty=1"):
            robust_mean(x, rule, 1)
        assert robust_mean(x, rule, 2).isfinite().all()


# ---- how many may be faulty


@pytest.mark.parametrize(
    ("rule", "n", "f", "message"),
    [
        ("median", 4, 2, "needs at least 2f \\+ 1 ranks but there are 4; use num_faulty=1 or less"),
        ("trimmed_mean", 6, 3, "needs at least 2f"),
        ("norm_clip", 2, 1, "num_faulty=0 or less"),
        ("krum", 6, 2, "needs at least 2f \\+ 3 ranks but there are 6; use num_faulty=1 or less"),
        ("multi_krum", 2, 0, "use more ranks"),
        (
            "nearest",
            9,
            3,
            "needs at least 3f \\+ 1 ranks but there are 9; use num_faulty=2 or less",
        ),
        ("mean", 9, 1, "one faulty rank can move the mean anywhere; use another rule"),
        ("median", 4, -1, "num_faulty=-1 must be >= 0"),
    ],
)
def test_too_many_faulty(rule: Rule, n: int, f: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_num_faulty(rule, n, f)


@pytest.mark.parametrize(
    ("rule", "n", "f"),
    [
        ("median", 5, 2),
        ("trimmed_mean", 3, 1),
        ("norm_clip", 1, 0),
        ("krum", 7, 2),
        ("nearest", 6, 1),
    ],
)
def test_just_enough_ranks(rule: Rule, n: int, f: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_num_faulty(rule, n, f)


def test_nearest_warns_below_five() -> None:
    with pytest.warns(UserWarning, match=r"below 5f \+ 1 ranks.*num_faulty=1 or less"):
        check_num_faulty("nearest", 10, 2)


# ---- attackers


def distances_after_training(
    rule: Rule, attack: Callable[..., torch.Tensor], n: int = 16, f: int = 3
) -> float:
    """Gradient descent on |x - target|^2 / 2 with noisy gradients; the distance left, of 1 at the start."""
    p = 100
    target = torch.full((p,), 1 / p**0.5, dtype=torch.float64)
    x = torch.zeros(p, dtype=torch.float64)
    for step in range(80):
        honest = (x - target) + 0.1 * sample((n - f, p), step)
        sent = torch.cat([honest, attack(honest, f)])
        x = x - 0.1 * robust_mean(sent, rule, 0 if rule == "mean" else f)
    return float((x - target).norm())


@pytest.mark.parametrize("attack", ["sign_flip", "gaussian", "inner_product"])
def test_the_mean_collapses(attack: str) -> None:
    assert distances_after_training("mean", ATTACKS[attack]) > 1


@every_robust_rule
@pytest.mark.parametrize("attack", ATTACKS)
def test_robust_rules_hold(rule: Rule, attack: str) -> None:
    """The noise alone leaves 0.1 sqrt(100) sqrt(0.1 / 2) = 0.23 of a single vector's steps, which is all that
    Krum has; the start is at 1."""
    assert distances_after_training(rule, ATTACKS[attack]) < 0.4


def test_without_attackers_the_rules_are_as_good_as_the_mean() -> None:
    def nobody(honest: torch.Tensor, faulty: int) -> torch.Tensor:
        return honest[:0]

    mean = distances_after_training("mean", nobody, 16, 3)
    for rule in ("median", "trimmed_mean", "multi_krum", "norm_clip", "nearest"):
        assert distances_after_training(rule, nobody, 16, 3) < 2 * mean


def test_a_little_is_enough_hides_among_the_honest() -> None:
    """Of an attack of that size the rules that drop whole vectors keep some; the harm is bounded by it."""
    honest = vectors(13, 400)
    sent = torch.cat([honest, little_is_enough(honest, 3)])
    per_element = (sent[-1] - honest.mean(0)) / honest.std(0)
    assert bool((per_element < 0).all())
    for rule in ROBUST:
        moved = (robust_mean(sent, rule, 3) - honest.mean(0)) / honest.std(0)
        assert float(moved.mean()) >= float(per_element.mean()) - 1e-12

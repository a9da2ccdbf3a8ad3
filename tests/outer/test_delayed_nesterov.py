"""The server's arithmetic. Values are dyadic where equality is asserted bit for bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from commkit.outer.delayed_nesterov import (
    DelayedNesterov,
    DelayedSGD,
    FedBuff,
    PushRule,
    StaleNesterov,
)

RULES: dict[str, Callable[[], PushRule]] = {
    "delayed_nesterov": lambda: DelayedNesterov(buffer_size=3, share=0.2),
    "vanilla": StaleNesterov,
    "delayed_sgd": lambda: DelayedSGD(buffer_size=3),
    "fedbuff": lambda: FedBuff(buffer_size=3),
}


def bound(rule: PushRule, workers: int = 2, size: int = 1) -> PushRule:
    rule.bind({"w": torch.zeros(size, dtype=torch.float64)}, workers)
    return rule


def g(*values: float) -> dict[str, Tensor]:
    return {"w": torch.tensor(values, dtype=torch.float64)}


def at(rule: PushRule) -> float:
    return float(rule.weights["w"][0])


def random_pushes(count: int, size: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"w": torch.randn(size, generator=generator, dtype=torch.float64)} for _ in range(count)
    ]


def nesterov(means: Sequence[Tensor], lr: float, momentum: float) -> Tensor:
    """torch's own, on the means of buffers."""
    w = torch.zeros_like(means[0]).requires_grad_()
    optimizer = torch.optim.SGD([w], lr=lr, momentum=momentum, nesterov=momentum > 0)
    for mean in means:
        w.grad = mean.clone()
        optimizer.step()
    return w.detach()


def mean_of(pushes: Sequence[dict[str, Tensor]]) -> Tensor:
    return torch.stack([p["w"] for p in pushes]).mean(0)


def test_hand_numbers() -> None:
    """N = 2, g = 1: the first push moves 0.35, the milestone 0.98."""
    rule = bound(DelayedNesterov(lr=0.7, momentum=0.9))
    rule.push(g(1.0))
    assert at(rule) == pytest.approx(-0.35)
    rule.push(g(1.0))
    assert at(rule) == pytest.approx(-0.35 - 0.98)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_without_share_every_buffer_is_a_synchronous_nesterov_step(size: int) -> None:
    rule = bound(DelayedNesterov(buffer_size=size), size=4)
    pushes = random_pushes(4 * size)
    for number, push in enumerate(pushes, 1):
        rule.push(push)
        if number % size == 0:
            means = [mean_of(pushes[k : k + size]) for k in range(0, number, size)]
            torch.testing.assert_close(rule.weights["w"], nesterov(means, 0.7, 0.9))


def test_a_buffer_of_one_is_torchs_nesterov_bit_for_bit() -> None:
    rule = DelayedNesterov(buffer_size=1)
    rule.bind({"w": torch.zeros(1000)}, 3)
    pushes = [push["w"].float() for push in random_pushes(5, 1000)]
    for push in pushes:
        rule.push({"w": push})
    assert torch.equal(rule.weights["w"], nesterov(pushes, 0.7, 0.9))


def test_the_largest_share_spreads_momentum_evenly() -> None:
    size = 4
    rule = bound(DelayedNesterov(lr=1.0, momentum=0.5, buffer_size=size, share=1 / size))
    for _ in range(size - 1):
        rule.push(g(1.0))
    rule.push(g(0.0))  # its own share is nothing: the rest is momentum
    positions = [at(rule)]
    m = float(rule.state_dict()["momenta"]["w"])
    for _ in range(size - 1):
        rule.push(g(0.0))
        positions.append(at(rule))
    moves = [b - a for a, b in itertools.pairwise([-(size - 1) / size, *positions])]
    assert moves == [-0.5 * m / size] * size


def test_momentum_is_spread_whole_whatever_the_share() -> None:
    """At the milestone and the N - 1 pushes after it, shares of one momentum add up to 1."""
    size = 4
    ends = []
    for share in (0.0, 0.125, 0.25):
        rule = bound(DelayedNesterov(lr=1.0, momentum=0.5, buffer_size=size, share=share))
        for value in (1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0):
            rule.push(g(value))
        ends.append(at(rule))
    assert ends == [ends[0]] * 3


def test_the_order_of_a_buffer_does_not_change_the_momentum() -> None:
    pushes = [g(1.0), g(-0.5), g(4.0), g(0.25)]
    ends = set()
    for order in itertools.permutations(pushes):
        rule = bound(DelayedNesterov(buffer_size=4))
        for push in order:
            rule.push(push)
        ends.add(float(rule.state_dict()["momenta"]["w"]))
    assert ends == {4.75 / 4}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("count", range(4, 9))
def test_what_is_left_at_the_end_becomes_a_milestone_of_its_size(share: float, count: int) -> None:
    rule = bound(DelayedNesterov(buffer_size=4, share=share), size=4)
    pushes = random_pushes(count)
    for push in pushes:
        rule.push(push)
    rule.flush()
    means = [mean_of(pushes[k : k + 4]) for k in range(0, count, 4)]
    torch.testing.assert_close(rule.weights["w"], nesterov(means, 0.7, 0.9))
    after = rule.weights["w"].clone()
    rule.flush()
    assert torch.equal(rule.weights["w"], after)
    # And training may go on: nothing of the old momentum is spread twice.
    more = random_pushes(4)
    for push in more:
        rule.push(push)
    rule.flush()
    torch.testing.assert_close(rule.weights["w"], nesterov([*means, mean_of(more)], 0.7, 0.9))


def test_vanilla_weighs_by_workers_and_staleness() -> None:
    rule = bound(StaleNesterov(lr=1.0, momentum=0.5), workers=4)
    rule.push(g(1.0), staleness=3)
    assert at(rule) == -1.5 * 0.25
    one, other = bound(StaleNesterov(), workers=1), bound(StaleNesterov(), workers=1)
    one.push(g(1.0))
    other.push(g(1.0), staleness=8)
    assert at(other) == pytest.approx(at(one) / 3)
    assert one.version == 1


def test_delayed_sgd_steps_on_the_mean_of_a_buffer() -> None:
    rule = bound(DelayedSGD(buffer_size=3), size=4)
    pushes = random_pushes(8)
    for number, push in enumerate(pushes, 1):
        before = rule.weights["w"].clone()
        rule.push(push)
        assert torch.equal(rule.weights["w"], before) == (number % 3 != 0)
    assert rule.version == 2
    rule.flush()
    means = [mean_of(pushes[k : k + 3]) for k in range(0, 8, 3)]
    torch.testing.assert_close(rule.weights["w"], nesterov(means, 0.7, 0.9))


def test_fedbuff_of_one_fresh_push_is_a_step_of_sgd() -> None:
    rule = bound(FedBuff(lr=0.5, buffer_size=1), size=4)
    pushes = random_pushes(3)
    for push in pushes:
        rule.push(push)
    torch.testing.assert_close(rule.weights["w"], nesterov([p["w"] for p in pushes], 0.5, 0.0))


def test_fedbuff_weighs_staleness_and_drops_what_is_too_stale() -> None:
    rule = bound(FedBuff(buffer_size=2, max_staleness=3))
    assert rule.push(g(1.0), staleness=0)
    assert not rule.push(g(100.0), staleness=4)
    assert rule.push(g(1.0), staleness=3)
    assert at(rule) == -(1 + 1 / math.sqrt(4)) / 2
    assert (rule.pushes, rule.version) == (2, 1)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_dropped_and_not_counted(name: str, bad: float) -> None:
    clean, struck = (bound(RULES[name](), size=4) for _ in range(2))
    for push in random_pushes(7):
        assert clean.push(push)
        assert not struck.push({"w": torch.tensor([1.0, bad, 0.0, 0.0], dtype=torch.float64)})
        assert struck.push(push)
        assert torch.equal(clean.weights["w"], struck.weights["w"])
    assert clean.pushes == struck.pushes == 7
    assert clean.version == struck.version


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("cut", range(5))
def test_a_resumed_rule_goes_on_bit_for_bit(name: str, cut: int) -> None:
    pushes = list(enumerate(random_pushes(8)))
    whole, first, second = (bound(RULES[name](), size=4) for _ in range(3))
    for number, push in pushes:
        whole.push(push, staleness=number % 3)
    for number, push in pushes[:cut]:
        first.push(push, staleness=number % 3)
    saved = {
        key: {n: x.clone() for n, x in value.items()} if isinstance(value, dict) else value
        for key, value in first.state_dict().items()
    }
    second.load_state_dict(saved)
    for number, push in pushes[cut:]:
        second.push(push, staleness=number % 3)
    assert torch.equal(whole.weights["w"], second.weights["w"])
    assert (whole.pushes, whole.version) == (second.pushes, second.version) == (8, whole.version)


def test_parameters_do_not_see_each_other_so_shards_equal_the_whole() -> None:
    names = ("a", "b", "c")
    start = {name: torch.zeros(3) for name in names}
    pushes = [{n: p["w"].float() * k for k, n in enumerate(names, 1)} for p in random_pushes(7, 3)]
    for make in RULES.values():
        whole, left, right = make(), make(), make()
        whole.bind(start, 2)
        left.bind({n: start[n] for n in names[:1]}, 2)
        right.bind({n: start[n] for n in names[1:]}, 2)
        for number, push in enumerate(pushes):
            whole.push(push, number % 2)
            left.push({n: push[n] for n in names[:1]}, number % 2)
            right.push({n: push[n] for n in names[1:]}, number % 2)
        for name, w in {**left.weights, **right.weights}.items():
            assert torch.equal(w, whole.weights[name])
        merged = whole.state_dict()
        left.load_state_dict(merged)
        assert torch.equal(left.weights["a"], whole.weights["a"])


def test_half_precision_weights_are_kept_in_full() -> None:
    rule = DelayedNesterov()
    rule.bind({"w": torch.ones(2, dtype=torch.bfloat16)}, 2)
    rule.push({"w": torch.full((2,), 2.0**-12)})
    assert rule.weights["w"].dtype == torch.float32
    assert bool((rule.weights["w"] < 1).all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DelayedNesterov(lr=0), r"lr=0 must be > 0"),
        (lambda: DelayedNesterov(momentum=1.0), r"momentum=1.0 must be in \[0, 1\)"),
        (lambda: DelayedNesterov(buffer_size=0), r"buffer_size=0 must be >= 1"),
        (lambda: DelayedNesterov(buffer_size=4, share=0.3), r"share=0.3 must be from 0 to 1/"),
        (lambda: DelayedNesterov(share=-0.1), r"share=-0.1"),
        (lambda: bound(DelayedNesterov(share=0.6), workers=2), r"share=0.6 .*0.5"),
        (lambda: FedBuff(max_staleness=-1), r"max_staleness=-1"),
        (lambda: bound(StaleNesterov(), workers=0), r"num_workers=0"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], PushRule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_state_of_another_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="keeps; resume with the rule that saved it"):
        bound(DelayedNesterov()).load_state_dict(bound(FedBuff()).state_dict())
    with pytest.raises(ValueError, match="no weights of parameter 'w'"):
        bound(FedBuff()).load_state_dict({"weights": {}, "sums": {}})
    rule = bound(FedBuff())
    with pytest.raises(RuntimeError, match="bound to weights already"):
        rule.bind({}, 1)

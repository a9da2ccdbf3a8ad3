"""Policies for the number of gradients to wait for."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from commkit.straggler import DBW, BackupPolicy, StarvedWorkerError, StaticBackup, StepResult

DIM = 1000  # in a few dimensions the norm of the noise is itself noise


class World:
    """SGD on f = L |x|^2 / 2 with noisy gradients, and workers with random times, of which ``slow`` take 5 s
    more in every step."""

    def __init__(self, n: int, noise: float, slow: int = 0, seed: int = 0) -> None:
        self.state = np.random.RandomState(seed)
        self.n, self.noise, self.slow = n, noise, slow
        self.x, self.lr, self.curvature = np.full(DIM, 9.5 / DIM**0.5), 0.05, 4.0
        self.step, self.seconds = 0, 0.0

    @property
    def loss(self) -> float:
        return self.curvature * float(self.x @ self.x) / 2

    def run(self, policy: BackupPolicy) -> int:
        k = policy.choose()
        times = 0.3 + self.state.exponential(size=self.n)
        times[: self.slow] += 5
        order = np.argsort(times)
        noise = self.noise * self.state.standard_normal((k, DIM)) / np.sqrt(DIM)
        g = self.curvature * self.x + noise
        m = g.mean(axis=0)
        result = StepResult(
            step=self.step,
            awaited=k,
            workers=tuple(order[:k].tolist()),
            seconds=tuple(times[order[:k]].tolist()),
            norms_squared=tuple((g**2).sum(axis=1).tolist()),
            mean_norm_squared=float(m @ m),
            losses=(self.loss,) * k,
            lr=self.lr,
        )
        policy.observe(result)
        for worker in order[k:]:
            policy.observe_late(self.step, float(times[worker]))
        self.x = self.x - self.lr * m
        self.step += 1
        self.seconds += float(times[order[k - 1]])
        return k


def test_dbw_begins_with_half_and_moves_by_two_at_most() -> None:
    world, policy = World(16, noise=14.0), DBW(16)
    ks = [world.run(policy) for _ in range(60)]
    assert ks[:5] == [8] * 5
    assert np.abs(np.diff(ks)).max() <= 2
    assert min(ks) >= 1


def test_dbw_waits_for_few_early_and_for_many_when_noise_dominates() -> None:
    world, policy = World(16, noise=14.0), DBW(16)
    ks = [world.run(policy) for _ in range(150)]
    assert min(ks[5:20]) <= 4
    assert np.mean(ks[100:]) > 10


def test_dbw_leaves_slow_workers_behind() -> None:
    world, policy = World(8, noise=2.0, slow=2), DBW(8)
    ks = [world.run(policy) for _ in range(18)]
    assert max(ks[6:]) <= 6
    assert (policy.drop_rates[:2] > 0.5).all()


def seconds_to_a_loss(make: Callable[[], BackupPolicy], seed: int) -> float:
    """From the first step."""
    world, policy = World(8, noise=30.0, slow=2, seed=seed), make()
    world.lr = 0.005
    while world.loss > 3.0:
        world.run(policy)
        assert world.step < 2000
    return world.seconds


def test_dbw_learns_how_slow_the_slowest_are_without_awaiting_them() -> None:
    world, policy = World(8, noise=2.0, slow=2), DBW(8)
    awaited = [world.run(policy) for _ in range(policy.gains.window)]
    assert max(awaited) == 4
    times = policy.times.estimate(4)
    assert times[7] > 2 * times[3] > 0


def test_dbw_is_near_the_best_static_number_without_tuning() -> None:
    def mean(make: Callable[[], BackupPolicy]) -> float:
        return float(np.mean([seconds_to_a_loss(make, seed) for seed in range(8)]))

    static = [mean(lambda k=k: StaticBackup(8, k, min_share=0)) for k in range(1, 9)]  # type: ignore[misc]
    dynamic = mean(lambda: DBW(8))
    print(f"seconds to the loss: static k=1..8 {np.round(static, 1).tolist()}, DBW {dynamic:.1f}")
    assert dynamic <= 1.3 * min(static)
    assert dynamic <= 0.3 * max(static)


def result(k: int, loss: float, step: int = 0, norm: float = 1.0, mean: float = 1.0) -> StepResult:
    """A step of k equal times and norms."""
    return StepResult(step, k, tuple(range(k)), (1.0,) * k, (norm,) * k, mean, (loss,) * k, lr=0.1)


def test_dbw_tries_what_was_never_timed_place_by_place() -> None:
    def tried(max_change: int) -> list[int]:
        policy, awaited = DBW(16, gain="noise_scale", max_change=max_change), []
        for t in range(9):
            k = policy.choose()
            awaited.append(k)
            policy.observe(
                result(k, loss=10.0, step=t, norm=10.0, mean=2.0)
            )  # much noise, all equally fast
        return awaited[5:]

    assert tried(2) == [9, 10, 11, 12]
    assert tried(8) == [12, 16, 16, 16]


def test_dbw_goes_up_one_by_one_to_all_while_no_number_promises_a_decrease() -> None:
    policy, awaited = DBW(6), []
    for t in range(12):  # zero mean: nothing but noise
        awaited.append(policy.choose())
        k = awaited[-1]
        policy.observe(result(k, loss=10.0, step=t, norm=float(k), mean=0.5))
    assert (policy.expected_gains() <= 0).all()
    assert awaited == [3] * 5 + [4, 5, 6, 6, 6, 6, 6]


def test_dbw_waits_for_one_more_while_the_loss_rises() -> None:
    def chosen(growth: float) -> int:
        policy = DBW(6, gain="noise_scale")
        for t in range(8):
            policy.observe(result(3, loss=10 * growth**t, step=t))
        return policy.choose()

    assert chosen(0.99) == 1  # no noise: one gradient is as good as six, and hysteresis stops there
    assert chosen(1.001) == 1
    assert chosen(1.02) == 4


def test_noise_scale_needs_neither_learning_rate_nor_smoothness() -> None:
    world, policy = World(16, noise=14.0), DBW(16, gain="noise_scale")
    ks = [world.run(policy) for _ in range(150)]
    assert min(ks[5:25]) < 8 < np.mean(ks[100:])


@pytest.mark.parametrize("gain", ["smoothness", "noise_scale"])
def test_dbw_resumes_exactly(gain: str) -> None:
    def run(interrupt: bool) -> list[int]:
        world, policy = World(8, noise=8.0, slow=1), DBW(8, gain=gain)  # type: ignore[arg-type]
        ks = [world.run(policy) for _ in range(20)]
        if interrupt:
            state = policy.state_dict()
            policy = DBW(8, gain=gain)  # type: ignore[arg-type]
            policy.load_state_dict(state)
        return ks + [world.run(policy) for _ in range(20)]

    assert run(True) == run(False)
    with pytest.raises(ValueError, match="the state is of 8 workers, but there are 9"):
        DBW(9).load_state_dict(DBW(8).state_dict())


def test_state_is_tensors_and_numbers() -> None:
    policy = DBW(3)
    policy.observe(result(3, 1.0))
    flat = [*policy.state_dict().values()]
    flat = [x for v in flat for x in (v.values() if isinstance(v, dict) else [v])]
    assert all(isinstance(x, torch.Tensor | int | float) for x in flat)


def test_late_gradients_tell_times_of_their_own_step() -> None:
    policy = DBW(4)
    policy.observe(result(4, 1.0, step=0))
    policy.observe(result(2, 1.0, step=1))  # 4 were awaited before
    policy.observe(result(2, 1.0, step=2))  # 2 were awaited before
    policy.observe_late(1, 7.0)
    policy.observe_late(1, 9.0)
    policy.observe_late(1, 99.0)  # there are only four
    policy.observe_late(55, 99.0)  # nobody knows that step
    np.testing.assert_allclose(policy.times.estimate(4), [1, 1, 4, 5])  # means with step 0's
    np.testing.assert_allclose(policy.times.estimate(2), [1, 1, 4, 5])  # bounds


def test_static_is_static_and_counts_who_is_dropped() -> None:
    policy = StaticBackup(4, 3)
    for t in range(40):
        assert policy.choose() == 3
        policy.observe(result(3, 1.0, step=t))
    np.testing.assert_allclose(policy.drop_rates, [0, 0, 0, 1])


def test_a_starved_worker_is_an_error_if_asked_for() -> None:
    policy, tolerant = StaticBackup(4, 3), StaticBackup(4, 3, min_share=0)
    for t in range(99):
        policy.observe(result(3, 1.0, step=t))
        tolerant.observe(result(3, 1.0, step=t))
    tolerant.observe(result(3, 1.0, step=99))
    with pytest.raises(
        StarvedWorkerError, match=r"worker 3 contributed to 0 of 100 .* deal the data"
    ):
        policy.observe(result(3, 1.0, step=99))


def test_taking_turns_is_no_starvation() -> None:
    policy = StaticBackup(4, 1)
    for t in range(400):
        policy.observe(StepResult(t, 1, (t % 4,), (1.0,), (1.0,), 1.0, (1.0,), 0.1))
    np.testing.assert_allclose(policy.drop_rates, [0.75] * 4)


def test_fewer_workers() -> None:
    dynamic, static = DBW(6), StaticBackup(6, 4)
    for t in range(8):
        dynamic.observe(result(6, 1.0, step=t))
    dynamic.resize(4)
    assert 1 <= dynamic.choose() <= 4
    assert dynamic.drop_rates.shape == (4,)
    static.resize(4)
    with pytest.raises(ValueError, match=r"k=4 must be in 1\.\.3, the number of workers; use 3"):
        static.resize(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StaticBackup(4, 5), r"k=5 must be in 1\.\.4.*use 4"),
        (lambda: StaticBackup(4, 0), r"k=0 must be in 1\.\.4.*use 1"),
        (lambda: StaticBackup(0, 1), r"num_workers=0 must be >= 1"),
        (lambda: StaticBackup(4, 2, min_share=2), r"min_share=2 must be in 0\.\.1"),
        (lambda: DBW(4, gain="magic"), r"gain='magic' must be 'smoothness' \(SGD\)"),
        (lambda: DBW(4, window=0), r"window=0 must be >= 1"),
        (lambda: DBW(4, max_change=0), r"max_change=0 must be >= 1"),
        (lambda: DBW(4, loss_tolerance=-1), r"loss_tolerance=-1 must be >= 0"),
        (lambda: StepResult(0, 1, (), (), (), 1.0, (), 0.1), r"equally many and at least one"),
        (
            lambda: StepResult(0, 1, (1,), (1.0, 2.0), (1.0,), 1.0, (1.0,), 0.1),
            r"got 1, 2, 1 and 1",
        ),
    ],
)
def test_bad_input_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]

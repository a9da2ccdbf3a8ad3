"""1-bit Adam: AdamW before the freeze, an exactly accounted momentum after it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from commkit.aggregators.sharding import spans_of
from commkit.optim import OneBitAdam
from tests.optim import driver
from tests.optim.driver import Replica, run, same_bits


def make(**fields: Any) -> driver.Make:
    settings: dict[str, Any] = {"lr": 1e-2, "freeze_step": 5, "min_numel": 0, "betas": (0.9, 0.99)}
    return lambda params: OneBitAdam(params, **(settings | fields))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_before_the_freeze_it_is_adamw_bit_by_bit(decay: float) -> None:
    ours = run(make(freeze_step=100, weight_decay=decay), 1, 20)[0]
    made = driver.parameters()
    theirs = torch.optim.AdamW(
        made.values(), 1e-2, (0.9, 0.99), weight_decay=decay, foreach=False, fused=False
    )
    for step in range(20):
        for name, p in made.items():
            p.grad = driver.noisy(0, step, name, p.detach())
        theirs.step()
    for name, p in made.items():
        assert torch.equal(p, ours.parameters[name]), name


class Account:
    """What one rank put in as momentum, and what came out, from the step after ``start`` on."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.gradient: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self.put_in: dict[str, Tensor] = {}
        self.came_out: dict[str, Tensor] = {}
        self.first: dict[str, Tensor] = {}  # the reducer's state at the start

    def note(self, mine: Replica, step: int) -> None:
        if step < self.start:
            return
        for name, p in mine.parameters.items():
            momentum = mine.optimizer.state[p]["exp_avg"].clone()
            if step > self.start:
                own = 0.9 * self.last[name] + 0.1 * self.gradient[name]
                self.put_in[name] = self.put_in.get(name, 0) + own
                self.came_out[name] = self.came_out.get(name, 0) + momentum
            self.last[name] = momentum
        if step == self.start:
            state = mine.optimizer.reducer.state_dict()
            self.first = {key: value.clone() for key, value in state.items()}


def unsent(states: list[dict[str, Tensor]], name: str, shape: torch.Size) -> Tensor:
    """Mean of the ranks' residuals, and what the servers hold."""
    total = torch.zeros(shape, dtype=torch.float64)
    for state in states:
        total += state[f"rank/{name}"] / len(states)
        for key, value in state.items():
            if key.startswith(f"aggregator/shard/{name}@"):
                start = int(key.rpartition("@")[2])
                total.view(-1)[start : start + value.numel()] += value
    return total


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_momenta_sent_and_unsent_add_up(world_size: int) -> None:
    """Sum of mean_i m_i == sum of m + mean residual + server residuals, in float64."""
    accounts = [Account(start=5) for _ in range(world_size)]

    def gradients(rank: int, step: int, name: str, x: Tensor) -> Tensor:
        g = driver.noisy(rank, step, name, x)
        accounts[rank].gradient[name] = g.clone()
        return g

    ranks = run(
        make(freeze_step=5),
        world_size,
        40,
        gradients,
        lambda mine, step: accounts[mine.comm.rank].note(mine, step),
        dtype=torch.float64,
    )
    assert same_bits(ranks)
    last = [mine.optimizer.reducer.state_dict() for mine in ranks]
    first = [account.first for account in accounts]
    for name, p in ranks[0].parameters.items():
        put_in = sum(account.put_in[name] for account in accounts) / world_size
        kept = unsent(last, name, p.shape) - unsent(first, name, p.shape)
        came_out = accounts[0].came_out[name]
        torch.testing.assert_close(came_out + kept, put_in, rtol=0, atol=1e-10)


def test_equal_magnitudes_are_sent_exactly() -> None:
    """With m = 0 at the freeze and gradients of one magnitude, signs lose nothing."""

    def gradients(rank: int, step: int, name: str, x: Tensor) -> Tensor:
        signs = torch.where(torch.arange(x.numel()).view(x.shape) % 3 == 0, -1.0, 1.0)
        return signs * (1.0 if step else 1e-15)  # a variance above 0, a momentum of almost nothing

    ranks = run(make(freeze_step=1), 2, 2, gradients)
    for mine in ranks:
        for key, value in mine.optimizer.reducer.state_dict().items():
            if key.startswith(("rank/", "aggregator/")):
                assert value.abs().max() < 1e-7, key


@pytest.mark.parametrize("world_size", [2, 3])
def test_replicas_hold_the_same_bits_and_learn(world_size: int) -> None:
    ranks = run(make(weight_decay=0.01), world_size, 200)
    assert same_bits(ranks)
    # Adam at lr 1e-2 with noise 0.3 ends about this near; frozen and compressed it must too.
    dense = run(make(freeze_step=10_000, weight_decay=0.01), world_size, 200)
    error = [float((x.flat() - 1).square().mean()) for x in (ranks[0], dense[0])]
    start = float(
        (torch.cat([p.reshape(-1) for p in driver.parameters().values()]) - 1).square().mean()
    )
    assert error[0] < 0.2 * start
    assert error[1] < 0.2 * start


@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_are_one_bit_per_element_each_way(world_size: int) -> None:
    shapes = {"big": (512, 300)}
    sizes: list[list[int]] = [[] for _ in range(world_size)]

    def note(mine: Replica, step: int) -> None:
        sizes[mine.comm.rank].append(mine.comm.bytes.wire_bytes)

    run(make(freeze_step=2), world_size, 4, body=note, shapes=shapes)
    numel = 512 * 300
    dense = 2 * (world_size - 1) * 4 * numel // world_size
    for own in sizes:
        assert own[0] == dense
        compressed = own[3] - own[2]
        spans = spans_of("big", numel, world_size, 4096)
        overhead = 16 * 2 * len(spans)  # a scale, a flag and padding for each message
        assert compressed <= dense / 32 * (1 + 4096 * world_size / numel) + overhead


def test_a_run_with_a_short_warm_up_sends_a_fifth() -> None:
    """15 % of 40 steps are dense: 1 / (0.15 + 0.85 / 32) = 5.7 times fewer bytes in all."""
    shapes = {"big": (512, 300)}
    ranks = run(make(freeze_step=6), 2, 40, shapes=shapes)
    dense = 40 * 4 * 512 * 300
    assert ranks[0].comm.bytes.wire_bytes <= dense / 5


def test_coordinates_without_gradient_never_move() -> None:
    """Signs cannot say zero: half of the matrix never gets a gradient, and must not drift."""

    def gradients(rank: int, step: int, name: str, x: Tensor) -> Tensor:
        g = driver.noisy(rank, step, name, x)
        if name == "matrix":
            g[12:] = 0
        return g

    ranks = run(make(freeze_step=3), 2, 300, gradients)
    before = driver.parameters()["matrix"]
    for mine in ranks:
        assert torch.equal(mine.parameters["matrix"][12:], before[12:])
        assert (mine.parameters["matrix"][:12] - before[:12]).abs().min() > 0
    assert same_bits(ranks)


def test_parameters_without_any_gradient_send_nothing() -> None:
    ranks = run(make(freeze_step=2), 2, 6, lambda rank, step, name, x: torch.zeros_like(x))
    wire = ranks[0].comm.bytes.wire_bytes
    assert wire == 2 * sum(
        4 * p.numel() for p in ranks[0].parameters.values()
    )  # the two dense steps
    for name, p in driver.parameters().items():
        assert torch.equal(ranks[0].parameters[name], p)


def test_a_mask_of_the_users_wins() -> None:
    mask = torch.zeros(24, 1)
    mask[:7] = 1

    def masked(params: list[nn.Parameter]) -> OneBitAdam:
        optimizer = make(freeze_step=3)(params)
        assert isinstance(optimizer, OneBitAdam)
        optimizer.set_mask(params[0], mask)
        return optimizer

    at_freeze: list[Tensor] = []

    def note(mine: Replica, step: int) -> None:
        if mine.comm.rank:
            return
        if step == 2:
            at_freeze.append(mine.parameters["matrix"].detach().clone())
        if step == 30:
            assert isinstance(mine.optimizer, OneBitAdam)

    ranks = run(masked, 2, 40, body=note)
    assert torch.equal(ranks[0].parameters["matrix"][7:], at_freeze[0][7:])
    assert (ranks[0].parameters["matrix"][:7] != at_freeze[0][:7]).all()


def test_a_mask_can_change_between_phases() -> None:
    def switch(mine: Replica, step: int) -> None:
        assert isinstance(mine.optimizer, OneBitAdam)
        if step == 10:
            mask = torch.zeros(16)
            mask[:4] = 1
            mine.optimizer.set_mask(mine.parameters["matrix"], mask)
        if step == 20:
            mine.optimizer.set_mask(mine.parameters["matrix"], None)

    ranks = run(make(), 2, 30, body=switch)
    assert same_bits(ranks)
    assert bool(ranks[0].flat().isfinite().all())


def test_a_mask_of_another_shape_is_refused() -> None:
    def body(mine: Replica, step: int) -> None:
        assert isinstance(mine.optimizer, OneBitAdam)
        with pytest.raises(ValueError, match=r"mask of shape \(5,\) .* \(24, 16\)"):
            mine.optimizer.set_mask(mine.parameters["matrix"], torch.ones(5))

    run(make(), 1, 1, body=body)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("when", [2, 5, 9])
def test_a_step_that_is_not_finite_never_happened(bad: float, when: int) -> None:
    """On one rank, in the warm-up, at the freeze, and after it."""

    def gradients(rank: int, step: int, name: str, x: Tensor) -> Tensor:
        g = driver.noisy(rank, step, name, x)
        if step == when and rank == 1 and name == "conv":
            g.view(-1)[3] = bad
        return g

    snapshots: list[tuple[Tensor, Any]] = []

    def note(mine: Replica, step: int) -> None:
        if mine.comm.rank == 0 and step in (when - 1, when):
            state = {
                name: {k: v for k, v in mine.optimizer.state[p].items() if k == "exp_avg"}
                for name, p in mine.parameters.items()
            }
            snapshots.append((mine.flat(), copy.deepcopy(state)))
        if step == when:
            assert mine.optimizer.reducer.skipped

    ranks = run(make(), 2, 15, gradients, note)
    (before, state_before), (after, state_after) = snapshots
    assert torch.equal(before, after)
    for name, state in state_before.items():
        assert torch.equal(state["exp_avg"], state_after[name]["exp_avg"])
    assert same_bits(ranks)
    assert bool(ranks[0].flat().isfinite().all())


def test_the_variance_freezes_itself_when_it_is_steady() -> None:
    frozen: list[list[bool]] = [[], []]

    def note(mine: Replica, step: int) -> None:
        assert isinstance(mine.optimizer, OneBitAdam)
        frozen[mine.comm.rank].append(mine.optimizer.frozen)

    def gradients(rank: int, step: int, name: str, x: Tensor) -> Tensor:
        g = driver.noisy(rank, 0, name, x * 0)
        return g * (10.0 if step < 5 else 1.0)  # a peak at first

    ranks = run(make(freeze_step="auto", betas=(0.9, 0.9), warmup_steps=12), 2, 80, gradients, note)
    assert frozen[0] == frozen[1]
    first = frozen[0].index(True)
    assert first >= 12
    assert all(frozen[0][first:])
    # 0.9^k of the peak must have sunk below the noise: 10 steps after it v still falls by more than 4 %.
    assert first > 20
    assert same_bits(ranks)


def test_a_growing_variance_does_not_freeze() -> None:
    def gradients(rank: int, step: int, name: str, x: Tensor) -> Tensor:
        return driver.noisy(rank, step, name, x * 0) * 1.1**step

    ranks = run(make(freeze_step="auto", betas=(0.9, 0.9)), 1, 60, gradients)
    assert isinstance(ranks[0].optimizer, OneBitAdam)
    assert not ranks[0].optimizer.frozen


def test_clipping_gradients_uses_one_coefficient_for_all_ranks() -> None:
    """Before step 3 of the algorithm: m_i = beta1 m + (1 - beta1) c g_i with c from the mean square norm."""
    shapes = {"matrix": (24, 16), "other": (50,)}
    maximum = 0.5

    def gradients(rank: int, step: int, name: str, x: Tensor) -> Tensor:
        return driver.noisy(rank, step, name, torch.zeros_like(x)) * (1 + 3 * rank)

    ranks = run(
        make(freeze_step=1, max_grad_norm=maximum, clip="gradient"),
        2,
        2,
        gradients,
        shapes=shapes,
        dtype=torch.float64,
    )
    zeros = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}

    def at(step: int, rank: int) -> dict[str, Tensor]:
        return {n: gradients(rank, step, n, zeros[n]) for n in shapes}

    def norm(tensors: dict[str, Tensor]) -> float:
        return float(torch.cat([x.reshape(-1) for x in tensors.values()]).norm())

    mean = {n: (at(0, 0)[n] + at(0, 1)[n]) / 2 for n in shapes}
    first = {n: 0.1 * min(1.0, maximum / norm(mean)) * x for n, x in mean.items()}
    common = math.sqrt((norm(at(1, 0)) ** 2 + norm(at(1, 1)) ** 2) / 2)
    for rank, mine in enumerate(ranks):
        state = mine.optimizer.reducer.state_dict()
        for name in shapes:
            own = 0.9 * first[name] + 0.1 * min(1.0, maximum / common) * at(1, rank)[name]
            # One shard per parameter here, so what was sent is mean|m_i| sgn(m_i).
            sent = own.abs().mean().float().double() * torch.where(own >= 0, 1.0, -1.0)
            torch.testing.assert_close(state[f"rank/{name}"], own - sent, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("clip", ["momentum", "gradient"])
def test_clipped_training_keeps_replicas_equal(clip: str) -> None:
    ranks = run(make(max_grad_norm=0.5, clip=clip), 3, 30)
    assert same_bits(ranks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_keep_float32_state(dtype: torch.dtype) -> None:
    ranks = run(make(lr=0.05), 2, 60, dtype=dtype)
    assert same_bits(ranks)
    for p in ranks[0].parameters.values():
        state = ranks[0].optimizer.state[p]
        assert state["exp_avg"].dtype == state["denominator"].dtype == torch.float32
        # The momentum did not pass through the parameter's dtype.
        if p.numel() > 100:
            assert not torch.equal(state["exp_avg"], state["exp_avg"].to(dtype).float())
    assert float((ranks[0].flat().float() - 1).abs().mean()) < 0.4


@pytest.mark.parametrize("at", [3, 12])
def test_resuming_goes_on_bit_by_bit(at: int) -> None:
    """Before and after the freeze, through each rank's own state_dict."""
    kept: list[Any] = [None, None]

    def note(mine: Replica, step: int) -> None:
        if step == at:
            kept[mine.comm.rank] = copy.deepcopy(
                (mine.optimizer.state_dict(), {n: p.detach() for n, p in mine.parameters.items()})
            )

    whole = run(make(), 2, 25, body=note)

    def resumed(params: list[nn.Parameter]) -> OneBitAdam:
        optimizer = make()(params)
        assert isinstance(optimizer, OneBitAdam)
        return optimizer

    def rank(comm: Any) -> Replica:
        mine = driver.replica(resumed, comm)
        state, values = kept[comm.rank]
        mine.optimizer.load_state_dict(state)
        with torch.no_grad():
            for name, p in mine.parameters.items():
                p.copy_(values[name])
        for step in range(at + 1, 25):
            mine.step(step)
        return mine

    from commkit.sim import run_threads

    again = run_threads(rank, 2)
    for before, after in zip(whole, again, strict=True):
        assert torch.equal(before.flat(), after.flat())


def test_another_ranks_state_is_refused() -> None:
    states: list[Any] = [None, None]

    def note(mine: Replica, step: int) -> None:
        states[mine.comm.rank] = mine.optimizer.state_dict()
        mine.comm.barrier()
        with pytest.raises(ValueError, match=r"state of rank \d of 2 was given to rank \d of 2"):
            mine.optimizer.load_state_dict(states[1 - mine.comm.rank])

    run(make(), 2, 1, body=note)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "beta": ({"betas": (1.0, 0.9)}, r"betas\[0\]=1.0 must be in \(0, 1\)"),
    "zero beta": ({"betas": (0.9, 0.0)}, r"betas\[1\]=0.0"),
    "freeze before warm-up": (
        {"freeze_step": 5, "warmup_steps": 10},
        "freeze_step=5 must not come before",
    ),
    "freeze at 0": ({"freeze_step": 0}, "freeze_step=0 must be"),
    "freeze text": ({"freeze_step": "soon"}, "freeze_step='soon' must be"),
    "ratio": ({"freeze_step": "auto", "ratio_threshold": 1.5}, "ratio_threshold=1.5"),
    "eps": ({"eps": 0.0}, "eps=0.0 must be > 0"),
    "lr": ({"lr": -1.0}, "lr=-1.0"),
    "decay": ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    "clip": ({"max_grad_norm": 1.0, "clip": "all"}, "clip='all'"),
    "norm": ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0"),
    "floor": ({"variance_floor": 1.0}, "variance_floor=1.0"),
    "scale": ({"scale": "l3"}, "scale='l3'"),
}


@pytest.mark.parametrize(("fields", "message"), BAD.values(), ids=BAD)
def test_bad_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**fields)([nn.Parameter(torch.zeros(3))])


def test_stepping_without_attaching_is_refused() -> None:
    optimizer = OneBitAdam([nn.Parameter(torch.zeros(3))])
    with pytest.raises(RuntimeError, match=r"not attached; call commkit.attach"):
        optimizer.step()

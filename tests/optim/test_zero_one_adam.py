"""0/1 Adam: its two schedules, and steps alone that end in equal bits."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from commkit.optim import ZeroOneAdam
from commkit.optim.zero_one_schedule import ZeroOneSchedule
from commkit.sim import ThreadComm, run_threads
from tests.optim import driver
from tests.optim.driver import Replica, run, same_bits


def make(**fields: Any) -> driver.Make:
    settings: dict[str, Any] = {
        "lr": 1e-2,
        "var_freeze_step": 10,
        "var_update_scaler": 2,
        "local_step_scaler": 10,
        "local_step_clipper": 4,
        "betas": (0.9, 0.99),
    }
    return lambda params: ZeroOneAdam(params, **(settings | fields))


def test_refreshes_drift_apart_by_powers_of_two() -> None:
    schedule = ZeroOneSchedule(var_freeze_step=60, var_update_scaler=3)
    assert [s for s in range(80) if schedule.refreshes(s)] == [
        0,
        1,
        2,
        3,
        5,
        7,
        9,
        13,
        17,
        21,
        29,
        37,
        45,
    ]


def test_intervals_double_up_to_the_clipper() -> None:
    schedule = ZeroOneSchedule(10, local_step_scaler=8, local_step_clipper=4)
    assert not any(schedule.is_local(step) for step in range(18))
    syncs = [step - 18 for step in range(18, 50) if not schedule.is_local(step)]
    assert syncs == [1, 3, 5, 7, 11, 15, 19, 23, 27, 31]


def test_every_interval_ends() -> None:
    for scaler in (1, 3, 5, 16):
        schedule = ZeroOneSchedule(4, local_step_scaler=scaler, local_step_clipper=16)
        syncs = [step for step in range(4, 400) if not schedule.is_local(step)]
        gaps = [b - a for a, b in itertools.pairwise(syncs)]
        assert max(gaps) == 16
        assert gaps == sorted(gaps)


@pytest.mark.parametrize("field", ["var_freeze_step", "var_update_scaler", "local_step_scaler"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_bad_schedules_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}={value!r} must be a number of steps >= 1"):
        make(**{field: value})([nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_replicas_differ_between_synchronisations_and_agree_after_each(world_size: int) -> None:
    equal: list[tuple[int, Tensor]] = []
    flats: list[dict[int, Tensor]] = [{} for _ in range(world_size)]

    def note(mine: Replica, step: int) -> None:
        flats[mine.comm.rank][step] = mine.flat()

    ranks = run(make(), world_size, 60, body=note)
    schedule = ranks[0].optimizer.schedule  # type: ignore[attr-defined]
    for step in range(60):
        same = all(torch.equal(flats[0][step], other[step]) for other in flats)
        assert same == (not schedule.is_local(step) or world_size == 1), step
    assert not equal


def test_local_steps_send_nothing() -> None:
    sizes: list[int] = []

    def note(mine: Replica, step: int) -> None:
        if mine.comm.rank == 0:
            sizes.append(mine.comm.bytes.wire_bytes)

    ranks = run(make(), 2, 60, body=note)
    schedule = ranks[0].optimizer.schedule  # type: ignore[attr-defined]
    for step in range(1, 60):
        assert (sizes[step] == sizes[step - 1]) == schedule.is_local(step), step


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_it_learns(world_size: int) -> None:
    ranks = run(make(), world_size, 250)
    start = torch.cat([p.reshape(-1) for p in driver.parameters().values()])
    assert float((ranks[0].flat() - 1).square().mean()) < 0.2 * float((start - 1).square().mean())


def test_momentum_after_a_synchronisation_is_the_mean_update_per_lr() -> None:
    """m = mean(u) / sum(lr): with equal gradients on all ranks and one step, the ordinary momentum, up to
    what signs lose; the loss is in the residuals."""
    ranks = run(make(local_step_clipper=1), 2, 40)
    for name, p in ranks[0].parameters.items():
        ours = [mine.optimizer.state[mine.parameters[name]] for mine in ranks]
        assert torch.equal(ours[0]["exp_avg"], ours[1]["exp_avg"])
        assert float(ours[0]["update"].abs().max()) == 0
        assert ours[0]["lr_sum"] == 0
        assert torch.equal(ours[0]["anchor"], p)


def test_weight_decay_is_that_of_adamw_when_gradients_are_zero() -> None:
    """Also through local steps, where a decay inside u would be ten times too strong."""

    def gradients(rank: int, step: int, name: str, x: Tensor) -> Tensor:
        return driver.noisy(rank, step, name, x) if step < 3 else torch.zeros_like(x)

    at: list[Tensor] = []

    def note(mine: Replica, step: int) -> None:
        if step == 3 and mine.comm.rank == 0:
            at.append(mine.flat())

    # lr = 0 in the Adam part cannot be had apart from the decay, so m must vanish: betas near 0.
    ranks = run(
        make(weight_decay=0.1, betas=(1e-6, 0.99), lr=0.01),
        1,
        50,
        gradients,
        note,
        dtype=torch.float64,
    )
    whole = at[0] * (1 - 0.01 * 0.1) ** 46
    # What signs and their residuals still push is of the size of the last noise, not of the decay.
    state = ranks[0].optimizer.reducer.state_dict()
    assert max(float(v.abs().max()) for k, v in state.items() if k.startswith("rank/")) < 1
    torch.testing.assert_close(ranks[0].flat().double(), whole, rtol=0.05, atol=0.3)


def test_a_learning_rate_of_zero_changes_nothing() -> None:
    ranks = run(make(lr=0.0, weight_decay=0.1), 2, 40)
    for name, p in driver.parameters().items():
        assert torch.equal(ranks[0].parameters[name], p)


def test_a_rank_with_a_bad_local_gradient_leaves_out_that_step() -> None:
    def gradients(rank: int, step: int, name: str, x: Tensor) -> Tensor:
        g = driver.noisy(rank, step, name, x)
        if rank == 1 and step in (5, 20, 22, 31):  # together, at a synchronisation, and alone
            g.view(-1)[0] = torch.nan
        return g

    ranks = run(make(), 2, 60, gradients)
    assert bool(ranks[0].flat().isfinite().all())
    assert bool(ranks[1].flat().isfinite().all())
    ranks = run(make(local_step_clipper=1), 2, 60, gradients)
    assert same_bits(ranks)


@pytest.mark.parametrize("at", [4, 11, 24, 32])
def test_resuming_goes_on_bit_by_bit(at: int) -> None:
    """In the first stage, in the second, and between two synchronisations."""
    kept: list[Any] = [None, None]

    def note(mine: Replica, step: int) -> None:
        if step == at:
            values = {n: p.detach() for n, p in mine.parameters.items()}
            kept[mine.comm.rank] = copy.deepcopy((mine.optimizer.state_dict(), values))

    whole = run(make(), 2, 50, body=note)

    def rank(comm: ThreadComm) -> Replica:
        mine = driver.replica(make(), comm)
        state, values = kept[comm.rank]
        with torch.no_grad():
            for name, p in mine.parameters.items():
                p.copy_(values[name])
        mine.optimizer.load_state_dict(state)
        for step in range(at + 1, 50):
            mine.step(step)
        return mine

    again = run_threads(rank, 2)
    for before, after in zip(whole, again, strict=True):
        assert torch.equal(before.flat(), after.flat())


def test_residuals_start_anew_at_the_switch() -> None:
    """Gradients and updates are different quantities."""
    norms: list[float] = []

    def note(mine: Replica, step: int) -> None:
        if mine.comm.rank == 0:
            norms.append(mine.optimizer.reducer.feedback.norm())

    run(make(), 2, 11, body=note)
    assert norms[9] > 0.1
    assert norms[10] < 0.05 * norms[9]

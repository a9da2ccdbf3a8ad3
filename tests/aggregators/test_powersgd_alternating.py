"""Alternating PowerSGD: a model of the same mathematics, what one side at a time can recover, parity."""

from __future__ import annotations

import pytest
import torch

from commkit.aggregators import PowerSGD
from commkit.reducer import Reducer
from commkit.schemes import powersgd
from commkit.sim import ThreadComm, run_threads
from commkit.types import NonFiniteError

from .inputs import aggregate, contexts, sample
from .powersgd_model import AlternatingModel
from .test_powersgd import low_rank

SHAPES = {"wide": (12, 50), "tall": (40, 10), "conv": (8, 4, 3, 3), "again": (12, 50)}

every_world = pytest.mark.parametrize("world_size", [1, 2, 3])


def everything(rank: int = 2) -> PowerSGD:
    return PowerSGD(rank, min_compression_rate=0.0, iteration="alternating")


def scheme(rank: int = 2, error_feedback: bool = True) -> Reducer:
    return powersgd(
        rank, min_compression_rate=0.0, error_feedback=error_feedback, iteration="alternating"
    )


def matrix(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.shape[0], -1)


def gradient(key: str, rank: int, step: int) -> torch.Tensor:
    """Half of it is common to all ranks and steps."""
    at = list(SHAPES).index(key) * 10_000
    return sample(SHAPES[key], at) + sample(SHAPES[key], at + 100 * (rank + 1) + step)


@every_world
@pytest.mark.parametrize("rank", [1, 3])
def test_twenty_steps_follow_the_model(rank: int, world_size: int) -> None:
    starts = {key: sample((rank, shape[0]), 77) for key, shape in SHAPES.items()}

    def body(comm: ThreadComm) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        reducer = scheme(rank)
        reducer.aggregator.load_state_dict({f"shared/left/{k}": p for k, p in starts.items()})
        outs = []
        for step in range(20):
            outs.append(reducer.reduce({k: gradient(k, comm.rank, step) for k in SHAPES}, comm))
            reducer.end_step()
        return outs, reducer.state_dict()

    ranks = run_threads(body, world_size)
    models = {key: AlternatingModel(p.T, world_size) for key, p in starts.items()}
    for step in range(20):
        for key, model in models.items():
            expected = model.step([matrix(gradient(key, r, step)) for r in range(world_size)])
            for outs, _ in ranks:
                error = matrix(outs[step][key]) - expected
                # float64 rounding through 20 iterations, each amplifying by a ratio of singular values
                assert error.norm() <= 1e-9 * expected.norm(), (step, key)
    for key, model in models.items():
        for (_, state), expected in zip(ranks, model.residuals, strict=True):
            error = matrix(state[f"rank/{key}"]) - expected
            assert error.norm() <= 1e-9 * expected.norm(), key


@every_world
def test_a_gradient_of_low_rank_has_arrived_after_every_odd_step(world_size: int) -> None:
    """An even step finds the row space; the odd one after it sends everything, residual included."""
    target = low_rank(30, 20, 2)

    def body(comm: ThreadComm) -> None:
        reducer, arrived = scheme(), torch.zeros(30, 20).double()
        for step in range(6):
            arrived += reducer.reduce({"w": target.clone()}, comm)["w"]
            reducer.end_step()
            if step % 2:
                torch.testing.assert_close(arrived, (step + 1) * target, rtol=1e-9, atol=1e-9)
                assert reducer.feedback.norm() < 1e-9

    run_threads(body, world_size)


def test_without_feedback_low_rank_is_exact_from_the_second_step() -> None:
    target = low_rank(30, 20, 2)

    def body(comm: ThreadComm) -> None:
        reducer = scheme(error_feedback=False)
        for step in range(6):
            out = reducer.reduce({"w": target.clone()}, comm)["w"]
            reducer.end_step()
            if step:
                torch.testing.assert_close(out, target, rtol=1e-9, atol=1e-9)

    run_threads(body, 2)


@pytest.mark.parametrize(("shape", "step"), [((6, 30), 0), ((30, 6), 1), ((8, 8), 0), ((8, 8), 1)])
def test_full_rank_on_the_known_side_is_the_mean(shape: tuple[int, ...], step: int) -> None:
    """A square basis spans everything: rows at even steps, columns at odd ones."""
    ranks = [[sample(shape, seed)] for seed in range(3)]
    mean = sum(xs[0] for xs in ranks) / 3
    for (outcome,) in aggregate(lambda: everything(64), ranks, step):
        torch.testing.assert_close(outcome.mean, mean, rtol=1e-10, atol=1e-10)


def test_the_running_mean_of_a_constant_gradient_converges_to_it() -> None:
    target, total, steps = sample((20, 30), 5), torch.zeros(20, 30).double(), 400

    def body(comm: ThreadComm) -> None:
        reducer = scheme()
        for _ in range(steps):
            total.add_(reducer.reduce({"w": target.clone()}, comm)["w"])
            reducer.end_step()

    run_threads(body, 1)
    # residual / steps; a pair of steps serves rank of at most 20 directions, so it is at most about
    # 2 * rows / rank gradients
    assert (total / steps - target).norm() < 20 / steps * target.norm()


def test_sides_follow_the_step_of_the_context_and_share_one_collective() -> None:
    """Also when steps differ within a reduction, and after a step that was given up."""
    xs = [sample((20, 30), 0), sample((20, 30), 1), sample((5,), 2)]

    def body(comm: ThreadComm) -> None:
        aggregator, sizes = everything(), []
        for step, ok in ((0, True), (1, True), (2, False), (3, True), (3, False), (4, True)):
            before = comm.bytes.payload_bytes, comm.bytes.rounds
            aggregator.aggregate(xs, contexts(xs, step), comm)
            aggregator.commit(ok)
            sizes.append((comm.bytes.payload_bytes - before[0]) // 8 - 5)
            assert comm.bytes.rounds == before[1] + 1
        assert sizes == [2 * 2 * (20 if step % 2 else 30) for step in (0, 1, 2, 3, 3, 4)]
        mixed = [*contexts(xs, 5)[:1], *contexts(xs, 6)[1:]]
        before = comm.bytes.payload_bytes, comm.bytes.rounds
        aggregator.aggregate(xs, mixed, comm)
        assert (comm.bytes.payload_bytes - before[0]) // 8 == 2 * 20 + 2 * 30 + 5
        assert comm.bytes.rounds == before[1] + 1

    run_threads(body, 2)


@pytest.mark.parametrize("bad_step", [0, 1, 2, 3])
def test_a_refused_step_leaves_both_factors_alone(bad_step: int) -> None:
    def body(comm: ThreadComm) -> None:
        aggregator = everything()
        for step in range(6):
            xs = [sample((20, 30), 10 * step + comm.rank)]
            before = {key: x.clone() for key, x in aggregator.state_dict().items()}
            if step == bad_step:
                if comm.rank == 1:
                    xs[0][3, 3] = torch.inf
                with pytest.raises(NonFiniteError):
                    aggregator.aggregate(xs, contexts(xs, step), comm)
                aggregator.commit(False)
                after = aggregator.state_dict()
                assert before.keys() == after.keys()
                assert all(torch.equal(before[key], after[key]) for key in before)
            else:
                (outcome,) = aggregator.aggregate(xs, contexts(xs, step), comm)
                aggregator.commit(True)
                assert bool(outcome.mean.isfinite().all())

    run_threads(body, 2)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_resumed_run_continues_bit_for_bit(at: int) -> None:
    """In the middle of a pair too; memory layout is not part of a checkpoint."""

    def steps(reducer: Reducer, comm: ThreadComm, which: range) -> list[torch.Tensor]:
        outs = []
        for step in which:
            x = sample((21, 34), 10 * step + comm.rank, torch.float32)
            outs.append(reducer.reduce({"w": x}, comm)["w"].clone())
            reducer.end_step()
        return outs

    def body(comm: ThreadComm) -> None:
        whole, first, second = (scheme(3) for _ in range(3))
        expected = steps(whole, comm, range(6))
        outs = steps(first, comm, range(at))
        saved = first.state_dict()
        second.load_state_dict({k: torch.empty(x.shape).to(x).copy_(x) for k, x in saved.items()})
        outs += steps(second, comm, range(at, 6))
        assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))

    run_threads(body, 2)


def test_both_factors_are_equal_on_all_ranks() -> None:
    def body(comm: ThreadComm) -> dict[str, torch.Tensor]:
        aggregator = everything()
        for step in range(3):
            xs = [sample((20, 30), 10 * step + comm.rank)]
            aggregator.aggregate(xs, contexts(xs, step), comm)
            aggregator.commit(True)
        return aggregator.state_dict()

    first, second = run_threads(body, 2)
    assert first.keys() == second.keys() == {"shared/0", "shared/left/0"}
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_silent_layer_remembers_its_subspaces() -> None:
    """Steps without gradient, then the low-rank gradient of before: exact at once."""
    target = low_rank(30, 20, 2)

    def body(comm: ThreadComm) -> None:
        reducer = scheme(error_feedback=False)
        for step in range(8):
            x = torch.zeros_like(target) if step in (3, 4, 5) else target.clone()
            out = reducer.reduce({"w": x}, comm)["w"]
            reducer.end_step()
            if step > 5:
                torch.testing.assert_close(out, target, rtol=1e-9, atol=1e-9)

    run_threads(body, 2)


def test_state_goes_from_one_iteration_to_the_other() -> None:
    def body(comm: ThreadComm) -> None:
        xs = [sample((20, 30), comm.rank)]
        alternating, two_sided = everything(), PowerSGD(2, 0.0)
        for step in range(2):
            alternating.aggregate(xs, contexts(xs, step), comm)
            alternating.commit(True)
        two_sided.load_state_dict(alternating.state_dict())
        assert two_sided.state_dict().keys() == {"shared/0"}
        everything().load_state_dict(two_sided.state_dict())

    run_threads(body, 2)
